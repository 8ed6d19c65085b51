"""When a trial has lost: a statistical race against the best trial so far, over the same samples."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

ERROR_RATE = 0.05
"""Chance, at most, that a trial is stopped that is at least as good as the best one over all samples."""

_FEWEST = 4
"""Samples below which a standard deviation says too little."""


def rungs(samples: int) -> tuple[int, ...]:
    """After how many samples to look at a trial: a quarter of them, half of them, all; small first rungs are left out.

    Args:
        samples: how many there are.
    """
    early = sorted({math.ceil(samples / 4), math.ceil(samples / 2)})
    return (*(rung for rung in early if _FEWEST <= rung < samples), samples)


def lost(differences: npt.NDArray[np.float64], samples: int, looks: int) -> bool:
    """Whether a trial is hopeless by what was seen of it.

    The samples seen are a random draw, without replacement, from all of them. The trial has lost where the upper
    one-sided confidence bound of its mean difference over all samples lies below zero: Student's t with the finite
    population correction, at ``ERROR_RATE`` divided by the number of early looks (Bonferroni). It is exact where
    differences are normal, and approximate, as such bounds are, elsewhere.

    Args:
        differences: the trial's score minus the best one's, on each sample seen so far; at least 2.
        samples: how many there are in all.
        looks: how many early looks a trial gets.
    """
    seen = len(differences)
    error = float(differences.std(ddof=1)) * math.sqrt((1.0 - seen / samples) / seen)
    quantile = float(stdtrit(seen - 1, 1.0 - ERROR_RATE / looks))
    return float(differences.mean()) + quantile * error < 0.0
