"""Objective against trials, drawn in a terminal."""

from collections.abc import Sequence
from itertools import accumulate
from math import inf

from vflow_client.v1.strategies_pb2 import Trial

LEGEND = "objective against trials (* new best, o tried, x stopped early, v lower, - best until then)"
_LABEL = 8


def best_until(tried: Sequence[Trial]) -> list[float]:
    """For each trial the best objective up to it; one that was stopped early is an estimate and does not count."""
    return list(accumulate((-inf if trial.stopped_early else trial.objective for trial in tried), max))


def objective_chart(tried: Sequence[Trial], *, width: int = 72, height: int = 12) -> str:
    """Draws the trials of a search, in turn from left to right, in `width` columns and `height` lines and two more.

    Outliers at the bottom are marked as such on the lowest line, so that they do not press all others together.

    Raises:
        ValueError: there are no trials.
    """
    if not tried:
        raise ValueError("a chart needs at least one trial")
    columns = max(width - _LABEL - 2, 2)
    low, high = _floor([trial.objective for trial in tried]), max(trial.objective for trial in tried)
    cells = [[" "] * columns for _ in range(height)]

    def line(objective: float) -> int:
        """Counted from the top."""
        return 0 if high == low else round((high - max(objective, low)) / (high - low) * (height - 1))

    places = [number * (columns - 1) // max(len(tried) - 1, 1) for number in range(len(tried))]
    best = best_until(tried)
    for number, place in enumerate(places):
        if best[number] >= low:
            end = places[number + 1] if number + 1 < len(tried) else columns
            cells[line(best[number])][place:end] = "-" * (end - place)
    # Where several fall into one place, the most telling mark stays.
    for mark in "vxo*":
        for number, (place, trial) in enumerate(zip(places, tried, strict=True)):
            if ("v" if trial.objective < low else _mark(trial, best[number - 1] if number else -inf)) == mark:
                cells[line(trial.objective)][place] = mark
    labels = [f"{high:.4f}", *[""] * (height - 2), f"{low:.4f}"]
    rows = [f"{label:>{_LABEL}} |{''.join(row)}".rstrip() for label, row in zip(labels, cells, strict=True)]
    ends = f"1{len(tried):>{columns - 1}}" if len(tried) > 1 else "1"
    return "\n".join([*rows, f"{'':{_LABEL}} +{'-' * columns}", f"{'':{_LABEL}}  {ends}"])


def _floor(objectives: Sequence[float]) -> float:
    """The lowest value, but at most one and a half times as far below the lower quartile as that is below the top."""
    ordered = sorted(objectives)
    quartile = ordered[len(ordered) // 4]
    return max(ordered[0], quartile - 1.5 * (ordered[-1] - quartile))


def _mark(trial: Trial, best_before: float) -> str:
    if trial.stopped_early:
        return "x"
    return "*" if trial.objective > best_before else "o"
