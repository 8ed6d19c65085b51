"""Metrics, traces and logs, which all parts of the service report to."""
