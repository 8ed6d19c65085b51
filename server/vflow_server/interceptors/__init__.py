"""Interceptors around every call: metrics and traces, access, draining."""
