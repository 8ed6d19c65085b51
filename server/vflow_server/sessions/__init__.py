"""Sessions, and their work for the engine: turns, pictures that are added before a question, and forks."""
