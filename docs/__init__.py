"""The documentation: pages in Markdown, and `_generate`, which makes the others from the code."""
