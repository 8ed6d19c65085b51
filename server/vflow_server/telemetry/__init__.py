"""What is counted, traced and logged as it happens, for any part of the service to report to."""
