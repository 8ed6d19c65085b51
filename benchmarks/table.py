"""Rows of figures, as a table on the screen and as JSON in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, object]


def render(rows: Sequence[Row]) -> str:
    """A plain-text table, one column for each key of the first row; a key's words stand below each other."""
    words = [key.split("_") for key in rows[0]]
    height = max(map(len, words))
    head = list(zip(*([""] * (height - len(column)) + column for column in words), strict=True))
    body = [tuple(_cell(row.get(key)) for key in rows[0]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*head, *body, strict=True)]
    rule = tuple("-" * width for width in widths)
    return "\n".join(_line(cells, widths) for cells in (*head, rule, *body))


def publish(rows: Sequence[Row], json_path: Path | None) -> None:
    """Print the table, and write the rows to ``json_path`` if there is one."""
    print(render(rows), flush=True)
    if json_path:
        write(rows, json_path)


def write(rows: Sequence[Row], json_path: Path) -> None:
    """Write the rows as JSON, one a line; missing folders are made."""
    json_path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    json_path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, figures to the right."""
    (name, name_width), *figures = zip(cells, widths, strict=True)
    return "  ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in figures)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return "/".join(map(_cell, value))
    return str(value)
