"""What one strategy gains over another on samples, and whether that may be chance."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vflow_client.quantities import counted
from vflow_client.v1.strategies_pb2 import CompareStrategiesResponse, Strategy

FEWEST = 8
"""Pictures from which on an interval says something."""

ENOUGH = 30
"""Pictures that a search should have where no interval is known."""

_RESAMPLES = 2000
_SAME_BUDGET = 0.005
"""Budgets that differ by less than this are the same: a search meets its own only after rounding."""


@dataclass(frozen=True)
class Gain:
    """The gain in the objective, averaged over pictures.

    Attributes:
        mean: the gain.
        low: lower end of its 95% interval, by bootstrap over the pictures.
        high: upper end.
        pictures: number of pictures.
    """

    mean: float
    low: float
    high: float
    pictures: int

    def __str__(self) -> str:
        """The gain for people."""
        measured = counted(self.pictures, "picture")
        if self.pictures < FEWEST:
            return f"{self.mean:+.4f} on {measured}, too few to tell it from chance"
        return f"{self.mean:+.4f} on {measured}, 95% interval {self.low:+.4f} to {self.high:+.4f}"


def gain_of(comparison: CompareStrategiesResponse) -> Gain | None:
    """The gain of the second strategy over the first; None if the service does not say how each sample fared."""
    first, second = (compared.sample_objectives for compared in comparison.compared)
    if not first or len(first) != len(second):
        return None
    return gain([after - before for before, after in zip(first, second, strict=True)])


def gain(differences: Sequence[float]) -> Gain:
    """The gain whose values on the single pictures are `differences`, at least one."""
    chance, count = random.Random(0), len(differences)
    means = sorted(sum(chance.choices(differences, k=count)) / count for _ in range(_RESAMPLES))
    low, high = means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1]
    return Gain(sum(differences) / count, low, high, count)


def doubt(base: Strategy, found: Strategy, comparison: CompareStrategiesResponse | None) -> str | None:
    """Why `found` should not replace `base` without a person's decision; None if nothing speaks against it.

    A strategy of another budget is another choice, not a gain or a loss: for it, only the number of pictures counts.
    """
    same_budget = abs(base.budget - found.budget) < _SAME_BUDGET
    measured = None if comparison is None else gain_of(comparison)
    if measured is None:
        pictures, difference = found.provenance.samples, found.provenance.objective - found.provenance.base_objective
        if pictures < ENOUGH:
            return f"it was found on {counted(pictures, 'picture')} and not compared; that takes {ENOUGH} or more"
        return f"it gains nothing ({difference:+.4f})" if same_budget and difference <= 0 else None
    if measured.pictures < FEWEST or (same_budget and measured.low <= 0):
        return f"the gain may be chance ({measured})"
    return None
