"""What happens around every call: metrics and traces, access, draining."""
