"""The engine: the one thread that owns the model, the queue of work for it, and the scheduler of its steps."""
