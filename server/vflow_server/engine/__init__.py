"""The engine: the one thread that owns the model, what waits for it, and what it does in its next step."""
