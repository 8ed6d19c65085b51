"""Strategies: the ones that exist, the active one, their history, and comparisons of them."""
