"""Confidence intervals of shares, by drawing pictures again with replacement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A 95% interval of the percentile bootstrap."""

    low: float
    high: float


class Bootstrap:
    """Draws over pictures that are the same for all that is compared: differences are paired.

    Questions about one picture are right or wrong together, so pictures are what is drawn, not questions.

    Args:
        pictures: how many there are.
        seed: of the draws.
    """

    def __init__(self, pictures: int, seed: int = 0) -> None:
        drawn = np.random.default_rng(seed).integers(0, pictures, (DRAWS, pictures))
        self._times = np.stack([np.bincount(draw, minlength=pictures) for draw in drawn]).astype(np.float64)

    def shares(self, hits: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """The share of hits in each draw: [draws]; NaN in a draw without any question.

        Args:
            hits: per picture, [pictures].
            asked: per picture, [pictures].
        """
        total = self._times @ asked
        shares: np.ndarray = np.divide(self._times @ hits, total, out=np.full(DRAWS, np.nan), where=total > 0)
        return shares


def interval(draws: np.ndarray) -> Interval:
    """The 95% interval of a statistic's draws, [draws]."""
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return Interval(float(low), float(high))


def verdict(draws: np.ndarray, others: np.ndarray) -> str:
    """Whether the share behind ``draws`` is ahead of the one behind ``others``: "ahead", "behind" or "tie".

    A tie is a difference whose interval holds zero.
    """
    difference = interval(draws - others)
    return "ahead" if difference.low > 0 else "behind" if difference.high < 0 else "tie"
