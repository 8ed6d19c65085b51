"""Compiled kernels for the CPU: pages of C, compiled for this processor when they are first needed."""
