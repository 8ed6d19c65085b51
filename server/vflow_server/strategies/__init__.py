"""Strategies: which exist and which is active, where they come from, and how they compare."""
