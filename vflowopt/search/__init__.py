"""The search for a strategy: calibration, the search space, proposals, and early stopping of trials."""
