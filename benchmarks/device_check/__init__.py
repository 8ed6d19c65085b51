"""One command that checks a device: tests, exactness, and speed in the shapes of published models, within minutes.

``__main__`` is the command. It starts a worker, which runs the parts one after another, writes down what the worker
sends, and compares it with the targets at the end. It imports nothing that is not in the standard library, so it lives
on whatever happens to the worker.
"""
