"""Early stopping of trials: a statistical race against the best trial so far, over the same samples."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

ERROR_RATE = 0.05
"""The greatest chance that a trial is stopped although it is at least as good as the best one over all samples."""

_FEWEST = 4
"""The fewest samples from which a standard deviation is estimated."""


def rungs(samples: int) -> tuple[int, ...]:
    """After how many samples to look at a trial: a quarter of them, half of them, all; small first rungs are left out.

    Args:
        samples: how many there are.
    """
    early = sorted({math.ceil(samples / 4), math.ceil(samples / 2)})
    return (*(rung for rung in early if _FEWEST <= rung < samples), samples)


def lost(differences: npt.NDArray[np.float64], samples: int, looks: int) -> bool:
    """Whether a trial has lost, judged by the samples seen so far.

    The samples seen are a random draw, without replacement, from all of them. The trial has lost if the upper one-sided
    confidence bound of its mean difference over all samples is below zero: Student's t with the finite population
    correction, at ``ERROR_RATE`` divided by the number of early looks (Bonferroni). The bound is exact for normally
    distributed differences, and approximate for others.

    Args:
        differences: the trial's score minus the best one's, on each sample seen so far; at least 2.
        samples: how many there are in all.
        looks: how many early looks a trial gets.
    """
    seen = len(differences)
    error = float(differences.std(ddof=1)) * math.sqrt((1.0 - seen / samples) / seen)
    quantile = float(stdtrit(seen - 1, 1.0 - ERROR_RATE / looks))
    return float(differences.mean()) + quantile * error < 0.0
