"""Attacks on the service, and what they cost other tenants: ``python -m benchmarks.attacks``."""
