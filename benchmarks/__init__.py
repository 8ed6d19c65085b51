"""What the README claims, as commands that print it. Run each with ``python -m benchmarks.NAME``."""
