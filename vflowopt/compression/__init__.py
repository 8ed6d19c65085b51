"""The method, as pure functions: importance, pruning, recycling, diversity, and the pipeline that joins them."""
