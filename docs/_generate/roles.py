"""An extension of Griffe: docstrings name things as Sphinx does, and the site shows them as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=`)")


class Roles(Extension):
    """Takes the role out of `:class:` and its like, which Markdown does not know."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Change the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub("", obj.docstring.value)
