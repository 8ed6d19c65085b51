"""Lines over a common axis, drawn as SVG: text that any browser and code host shows, without a plotting library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 200, 30, 50
_COLOURS = (
    "#1b4f9c", "#d6542a", "#2e8b57", "#8e44ad", "#c99700", "#00838f",
    "#ad1457", "#5d4037", "#616161", "#7cb342", "#3949ab", "#ef6c00",
)  # fmt: skip

_MOST_TICKS = 16
"""Values across up to which each is named, and each point marked."""

Points = Sequence[tuple[float, float]]


def line_chart(
    lines: Mapping[str, Points],
    *,
    title: str,
    across: str,
    up: str,
    tick: Callable[[float], str] = "{:.0%}".format,
) -> str:
    """Draw lines, one for each name, as the text of an SVG file.

    Shares from 0 to 1 are drawn upwards, as percentages. The values across stand at equal distances, so that small
    budgets are not squeezed together. The first line is drawn thicker.

    Args:
        lines: points (x, y).
        title: above the chart.
        across: name of the axis across.
        up: name of the axis upwards.
        tick: how a value across is written; by default as a percentage, too.

    Raises:
        ValueError: there are no points.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("a chart needs at least one point")
    ticks = sorted({x for x, _ in points})
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = max((high - low) * 0.08, 0.01)
    low, high = max(0.0, low - margin), min(1.0, high + margin)

    def place(x: float, y: float) -> tuple[float, float]:
        step = (_WIDTH - _LEFT - _RIGHT) / max(len(ticks) - 1, 1)
        return _LEFT + ticks.index(x) * step, _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 18, title, size=14),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, across, anchor="middle"),
        _text(8, _TOP - 10, up),
    ]
    for x in ticks[:: -(-len(ticks) // _MOST_TICKS)]:
        left, _ = place(x, low)
        parts.append(_text(left, _HEIGHT - _BOTTOM + 18, tick(x), anchor="middle"))
    for y in (low + (high - low) * step / 5 for step in range(6)):
        _, top = place(ticks[0], y)
        parts.append(f'<path d="M{_LEFT} {top:.1f}H{_WIDTH - _RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(_LEFT - 8, top + 4, f"{y:.1%}", anchor="end"))
    for number, (name, line) in enumerate(lines.items()):
        colour, width = _COLOURS[number % len(_COLOURS)], 1.5 if number else 3.0
        dashes = ' stroke-dasharray="5 3"' if number >= len(_COLOURS) else ""
        corners = [place(*point) for point in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>')
        if len(ticks) <= _MOST_TICKS:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 1}" fill="{colour}"/>' for x, y in corners]
        top = _TOP + 16 * number
        parts.append(f'<path d="M{_WIDTH - _RIGHT + 14} {top}h18" stroke="{colour}" stroke-width="{width}"{dashes}/>')
        parts.append(_text(_WIDTH - _RIGHT + 38, top + 4, name))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
