"""The objectives of a search's trials, drawn in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING

from vflow_client.v1.strategies_pb2 import Trial

if TYPE_CHECKING:
    from rich.text import Text

LEGEND = "objective by trial: * new best, o tried, x stopped early, v below the chart, line: best so far"
MIN_RANGE = 1e-4
"""Smallest range of objectives that is drawn: a step of their last digit."""

_STYLES = {"*": "bold green", "x": "red", "v": "red"}


def best_until(trials: Sequence[Trial]) -> list[float]:
    """For each trial the best objective up to it. A trial that was stopped early is an estimate and does not count."""
    return list(accumulate((-inf if trial.stopped_early else trial.objective for trial in trials), max))


def objective_chart(trials: Sequence[Trial], *, width: int = 72, height: int = 14) -> Text:
    """Draws the trials of a search from left to right, `width` columns wide and `height` lines high.

    Outliers at the bottom are marked as such on the lowest line, so that they do not compress the rest.

    Raises:
        ValueError: there are no trials.
    """
    if not trials:
        raise ValueError("a chart needs at least one trial")
    import plotext
    from rich.text import Text

    high = max(trial.objective for trial in trials)
    low = min(_floor([trial.objective for trial in trials]), high - MIN_RANGE)
    best = best_until(trials)
    plotext.terminal.limit(False, False)  # the caller knows the width, also where there is no terminal
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless").plot_size(width, height)
    steps = [
        (x, objective)
        for number, objective in enumerate(best, start=1)
        if objective >= low
        for x in (number, min(number + 1, len(trials)))
    ]
    if steps:
        figure.draw(figure.signal(*zip(*steps, strict=True), marker="braille").lines())
    marks = [_mark(trial, best[number - 1] if number else -inf, low) for number, trial in enumerate(trials)]
    for mark in "vxo*":  # where several fall into one place, the last of these stays
        points = [
            (number, max(trial.objective, low))
            for number, trial in enumerate(trials, start=1)
            if marks[number - 1] == mark
        ]
        if points:
            figure.draw(figure.signal(*zip(*points, strict=True), marker=mark))
    figure.ruler("y").lim(low, high).ticks([low, high], [f"{low:.4f}", f"{high:.4f}"])
    figure.ruler("x").ticks(sorted({1, len(trials)}))
    figure.axes(False, axis="x", side="upper").axes(False, axis="y", side="right")
    chart = Text(figure.build().string(colorless=True).rstrip("\n"))
    for mark, style in _STYLES.items():
        chart.highlight_words([mark], style)
    return chart


def _floor(objectives: Sequence[float]) -> float:
    """The lowest value, but at most one and a half times as far below the lower quartile as that is below the top."""
    ordered = sorted(objectives)
    quartile = ordered[len(ordered) // 4]
    return max(ordered[0], quartile - 1.5 * (ordered[-1] - quartile))


def _mark(trial: Trial, best_before: float, low: float) -> str:
    if trial.objective < low:
        return "v"
    if trial.stopped_early:
        return "x"
    return "*" if trial.objective > best_before else "o"
