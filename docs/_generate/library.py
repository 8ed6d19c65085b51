"""The reference of the library: one page for each of its packages, with every module in it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = """\
# {name}

::: {name}
    options:
      heading_level: 2
      show_root_heading: false
      show_root_toc_entry: false
"""


def pages(library: Path) -> dict[str, str]:
    """The Markdown page of each package of the library, by the package's own name.

    Args:
        library: the folder of the library.
    """
    made = {}
    for folder in sorted(init.parent for init in library.glob("*/__init__.py")):
        name = f"{library.name}.{folder.name}"
        modules = [path.stem for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
        made[folder.name] = _PACKAGE.format(name=name) + "".join(
            f"\n::: {name}.{module}\n    options:\n      heading_level: 2\n" for module in modules
        )
    return made
