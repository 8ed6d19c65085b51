"""The pictures and videos of requests: decoded within bounds, and held for their tenants."""
