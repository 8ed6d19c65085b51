"""What commands write for people: on a terminal in its width and with styles, elsewhere as plain lines.

rich is imported on use. It comes with the extra `vflowopt-client[cli]`, and commands that write plain text, such as
`vflow serve` and `vflow chat`, neither need it nor wait for it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

UNLIMITED = 10_000
"""Columns of what is no terminal: programs read lines, so lines are not wrapped."""


def console_on(stream: TextIO) -> Console:
    """A console that writes to `stream` and takes text literally. Characters that it cannot encode become `?`."""
    from rich.console import Console

    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    width = None if stream.isatty() else UNLIMITED
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def print_output(*parts: RenderableType) -> None:
    """Prints `parts` on the standard output, one below the other."""
    console = console_on(sys.stdout)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    # rich fills the last column of a table with spaces.
    print("\n".join(line.rstrip(" ") for line in captured.get().splitlines()), flush=True)


def fits_output(renderable: RenderableType) -> bool:
    """Whether the standard output is wide enough to show `renderable` without wrapping it."""
    console = console_on(sys.stdout)
    return console.measure(renderable, options=console.options.update(width=UNLIMITED)).maximum <= console.width


def table(rows: Sequence[Sequence[str]], *, head: Sequence[str] = (), right: Collection[int] = ()) -> Table:
    """A table of `rows`, all of one length, below `head`; columns whose number is in `right` are aligned right."""
    from rich.table import Column, Table

    columns = [
        Column(title, justify="right" if number in right else "left", overflow="fold")
        for number, title in enumerate(head or [""] * len(rows[0]))
    ]
    shown = Table(*columns, box=None, show_header=bool(head), pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for row in rows:
        shown.add_row(*row)
    return shown
