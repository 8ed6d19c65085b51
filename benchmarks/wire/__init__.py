"""Measures what the way from a token to the wire costs."""
