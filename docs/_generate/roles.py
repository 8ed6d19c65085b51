"""An extension of Griffe: docstrings are written as Sphinx reads them, and the site shows them as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=`)")


class Roles(Extension):
    """Takes the role out of `:class:` and its like, and the second colon out of the `::` before a block of code."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Change the docstring of an object below a package."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"::$", ":", _ROLE.sub("", obj.docstring.value), flags=re.M)

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Change the docstring of a package itself."""
        self.on_object(obj=pkg)
