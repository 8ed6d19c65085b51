"""Looking for better strategies: how faithful the active one is on live turns, and searches for one that costs less."""
