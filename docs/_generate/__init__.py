"""The parts of the documentation that are made from the code, and the hooks by which MkDocs takes them in."""
