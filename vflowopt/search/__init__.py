"""The search for a strategy: what it is measured on, what it tries next, and when it gives a trial up."""
