"""The next point that a search tries: a function of the points tried so far, and of nothing else.

So it can run on any thread or in another process, and a search can resume after any interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np

from vflowopt.search.space import Point

Sampler = Literal["gp", "tpe", "random"]
"""Gaussian process with expected improvement, tree-structured Parzen estimator, or uniformly random points."""


def propose(tried: Sequence[tuple[Point, float]], *, dimensions: int, sampler: Sampler, seed: int) -> Point:
    """A point of the unit cube where the value may be higher.

    Args:
        tried: points with their values, in the order in which they were tried. The first 10 points are random with
            any sampler.
        dimensions: coordinates of a point.
        sampler: how to choose.
        seed: the seed of the whole search; each number of points tried has random numbers of its own.
    """
    own = np.random.SeedSequence([seed, len(tried)])
    if sampler == "random":
        return tuple(np.random.default_rng(own).random(dimensions).tolist())
    import optuna  # it takes a while to import, and most processes never search

    seed_here = int(own.generate_state(1)[0])
    strategies = {"gp": optuna.samplers.GPSampler, "tpe": optuna.samplers.TPESampler}
    axes: dict[str, optuna.distributions.BaseDistribution] = {
        f"x{axis}": optuna.distributions.FloatDistribution(0.0, 1.0) for axis in range(dimensions)
    }
    with _silent():
        study = optuna.create_study(direction="maximize", sampler=strategies[sampler](seed=seed_here))
        study.add_trials(
            [
                optuna.trial.create_trial(params=dict(zip(axes, point, strict=True)), distributions=axes, value=value)
                for point, value in tried
            ]
        )
        chosen = study.ask(axes).params
    return tuple(chosen[axis] for axis in axes)


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress the line that optuna logs for each study, and restore its verbosity afterwards."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
