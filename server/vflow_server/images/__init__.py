"""Pictures and videos as requests bring them: decoded within bounds, held for their tenant."""
