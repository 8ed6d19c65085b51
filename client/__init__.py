"""Python client of VFlow."""
