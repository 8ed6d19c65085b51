"""The repository as files: where it is, and what its Python files import."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_files(folder: str) -> list[Path]:
    """The Python files of a folder that are written by hand."""
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if not {"v1", "build"} & set(path.parts)]


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, absolute, without the names taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
