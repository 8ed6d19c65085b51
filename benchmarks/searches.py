"""Searches to be compared, by sampler and seed; and what they found, on samples that none of them has seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.table import Row
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import Calibration, Comparison
from vflowopt.search.proposal import Sampler
from vflowopt.search.tuner import Trial, Tuner


@dataclass(frozen=True, eq=False)
class Search:
    """One finished search.

    Attributes:
        sampler: how its trials were proposed.
        seed: of the search.
        trials: in order.
        seconds: that it took, references not included.
    """

    sampler: Sampler
    seed: int
    trials: Sequence[Trial]
    seconds: float

    def best(self, trials: int) -> Trial:
        """The best one of the first ``trials`` trials."""
        seen = [trial for trial in self.trials[:trials] if not trial.stopped_early]
        return max(seen, key=lambda trial: trial.objective)

    @property
    def climb(self) -> list[float]:
        """The best objective after each trial."""
        return [self.best(trials).objective for trials in range(1, len(self.trials) + 1)]


def search(
    runtime: Runtime,
    calibration: Calibration,
    *,
    sampler: Sampler,
    seed: int,
    budget: float,
    base: Strategy,
    trials: int,
    progress: Callable[[], object],
) -> Search:
    """Run one search over prepared samples; ``progress`` is called after each trial.

    Raises:
        StrategyError: the budget cannot be reached.
        PoolExhausted: the pool is too small.
    """
    tuner = Tuner(runtime, calibration, budget=budget, base=base, trials=trials, seed=seed, sampler=sampler)
    begun = time.perf_counter()
    for step in tuner.steps():
        if isinstance(step, Trial):
            progress()
    return Search(sampler, seed, tuner.finished, time.perf_counter() - begun)


def objective(calibration: Calibration, strategy: Strategy) -> float:
    """Mean cosine of a strategy over prepared samples."""
    *_, comparison = calibration.compare(strategy)
    assert isinstance(comparison, Comparison)
    return comparison.objective


def row(searches: Sequence[Search], trials: int, held_out: Calibration) -> Row:
    """What searches of one sampler, with several seeds, came to after so many trials.

    Args:
        searches: each at least that long.
        trials: how many of each count.
        held_out: samples that no search has seen.
    """
    best = [each.best(trials) for each in searches]
    found = [trial.objective for trial in best]
    return {
        "search": f"{searches[0].sampler}, {trials} trials",
        "best_objective": float(np.mean(found)),
        "lowest": min(found),
        "highest": max(found),
        "held_out": float(np.mean([objective(held_out, trial.strategy) for trial in best])),
        "stopped_early": float(
            np.mean([sum(trial.stopped_early for trial in each.trials[:trials]) for each in searches])
        ),
    }
