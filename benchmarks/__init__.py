"""The benchmarks behind the numbers in the documentation. Run each with ``python -m benchmarks.NAME``."""
