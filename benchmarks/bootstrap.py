"""95% intervals of shares of right answers: scipy's percentile bootstrap over pictures.

Questions about one picture are right or wrong together, so pictures are drawn, not questions. Two methods are compared
on the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of a difference: "ahead", "behind", or "tie" where the interval holds zero."""
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "tie"


def share(hits: np.ndarray, asked: np.ndarray) -> Interval:
    """The share of right answers.

    Args:
        hits: per picture, how many were right.
        asked: per picture, how many questions there were; at least one in all.
    """
    return _interval(lambda hit, ask, axis: hit.sum(axis) / ask.sum(axis), hits, asked)


def difference(hits: np.ndarray, others: np.ndarray, asked: np.ndarray) -> Interval:
    """The share of right answers of one method less that of another one, asked the same questions.

    Args:
        hits: per picture, how many of the first one's answers were right.
        others: per picture, how many of the other one's.
        asked: per picture, how many questions there were; at least one in all.
    """
    return _interval(lambda hit, other, ask, axis: (hit - other).sum(axis) / ask.sum(axis), hits, others, asked)


def _interval(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> Interval:
    asked_about = columns[-1] > 0
    drawn = [column[asked_about] for column in columns]
    value = float(statistic(*drawn, axis=-1))
    if asked_about.sum() < 2:  # a bootstrap needs at least two pictures
        return Interval(value, value, value)
    # The same seed for all: the draws are the same, too.
    found = stats.bootstrap(
        drawn, statistic, paired=True, vectorized=True, n_resamples=DRAWS, method="percentile", rng=0
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))
