"""The targets of the check, for an H100, and whether they were met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.device_check.report import Report
from benchmarks.table import Row


@dataclass(frozen=True)
class Target:
    """What is wanted of a figure.

    Attributes:
        name: what it is about.
        wanted: the bound.
        at_least: whether the figure must be no less; else it must be no more.
        measured: reads the figure from a part's rows; None if it is not there.
    """

    name: str
    wanted: float
    at_least: bool
    measured: Callable[[Sequence[Row]], float | None]

    def verdict(self, rows: Sequence[Row]) -> Row:
        """The row of the target."""
        figure = self.measured(rows)
        met = figure is not None and (figure >= self.wanted if self.at_least else figure <= self.wanted)
        return {
            "target": self.name,
            "wanted": f"{'>=' if self.at_least else '<='} {self.wanted}",
            "measured": figure,
            "verdict": "not measured" if figure is None else "met" if met else "missed",
        }


SHAPES = ("onevision-7b", "qwen3-vl-8b")
"""The parts that the targets are held against."""


def verdicts(report: Report) -> list[Row]:
    """A row for each target, of each shape that was to be run."""
    return [
        {"shape": shape, **target.verdict(report.rows(shape))}
        for shape in SHAPES
        if shape in report.parts
        for target in TARGETS
    ]


def _figure(rows: Sequence[Row], name: str, **where: object) -> float | None:
    """A figure of the row in which all of ``where`` holds."""
    for row in rows:
        if all(row.get(key) == value for key, value in where.items()):
            value = row.get(name)
            return value if isinstance(value, float) else None
    return None


def _ratio(rows: Sequence[Row], name: str, step: str, over: str, under: str) -> float | None:
    """A figure at one retention, divided by that at another."""
    one, other = (_figure(rows, name, step=step, retention=retention) for retention in (over, under))
    return None if one is None or not other else one / other


def _added(rows: Sequence[Row]) -> float | None:
    """Scoring and choosing at 10%, as a share of encoding."""
    score, choose, encode = (
        _figure(rows, name, step="picture", retention="10%")
        for name in ("score_ms", "prune_and_recycle_ms", "encode_ms")
    )
    return None if score is None or choose is None or not encode else (score + choose) / encode


TARGETS = (
    Target(
        "decode at 10%, batch 32: share of the bandwidth bound",
        0.7,
        True,
        lambda rows: _figure(rows, "share_of_bound", step="decode", retention="10%", batch=32),
    ),
    Target(
        "prefill of the picture: 10% / 100%",
        0.15,
        False,
        lambda rows: _ratio(rows, "prefill_ms", "picture", "10%", "100%"),
    ),
    Target(
        "picture in to first token out: 100% / 10%",
        3.8,
        True,
        lambda rows: _ratio(rows, "from_picture_ms", "first token", "100%", "10%"),
    ),
    Target("scoring and choosing / encoding", 0.05, False, _added),
    Target(
        "device idle while decoding at 10%, batch 32",
        0.1,
        False,
        lambda rows: _figure(rows, "idle_share", step="decode", retention="10%", batch=32),
    ),
)
"""What the project wants of an H100. The paper's figure for the first token was taken on answers of a word or two."""
