"""Lines over a common axis, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

Points = Sequence[tuple[float, float]]

_MARKED = 16
"""Points of a line up to which each is marked."""

# Text stays text, and the same figures give the same file.
_REPEATABLE = {"svg.fonttype": "none", "svg.hashsalt": "vflow", "font.family": "sans-serif", "font.size": 10}


def line_chart(
    lines: Mapping[str, Points], *, title: str, across: str, up: str, levels: Mapping[str, float] | None = None
) -> Figure:
    """Draw lines, one for each name; the first is drawn thicker than the others.

    Shares from 0 to 1 are drawn upwards, as percentages. Shares across, such as budgets, are percentages on a
    logarithmic axis, so that small ones are not squeezed together; numbers of 1 and more stand on a linear one.

    Args:
        lines: points (x, y).
        title: above the chart.
        across: name of the axis across.
        up: name of the axis upwards.
        levels: dashed lines that go all the way across, by name.

    Raises:
        ValueError: there are no points.
    """
    xs = sorted({x for line in lines.values() for x, _ in line})
    if not xs:
        raise ValueError("a chart needs at least one point")
    with matplotlib.rc_context(_REPEATABLE):
        figure = Figure(figsize=(8.5, 4.6), layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.color_sequences["tab20"]
        axes.set_prop_cycle(color=[*colours[::2], *colours[1::2]])  # the strong ones first
        for number, (name, line) in enumerate(lines.items()):
            marker = "o" if len(xs) <= _MARKED else ""
            width = 1.5 if number else 3.5
            across_line, up_line = zip(*sorted(line), strict=True)
            axes.plot(across_line, up_line, label=name, marker=marker, markersize=width + 2, linewidth=width)
        for name, level in (levels or {}).items():
            axes.axhline(level, label=name, color="black", linestyle="--", linewidth=1.2)
        if max(xs) <= 1.0:
            axes.set_xscale("log")
            axes.set_xticks(xs, [f"{x:.0%}" for x in xs])
            axes.minorticks_off()
        elif len(xs) <= _MARKED:
            axes.set_xticks(xs)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(title=title, xlabel=across, ylabel=up)
        axes.grid(axis="y", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, as SVG or PNG by the name of the file; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_REPEATABLE):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
