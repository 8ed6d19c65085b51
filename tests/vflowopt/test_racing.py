"""A trial as good as the best one is rarely stopped; a clearly worse one usually is."""

import numpy as np
import pytest

from vflowopt.search.racing import ERROR_RATE, lost, rungs


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(1, (1,)), (4, (4,)), (7, (4, 7)), (8, (4, 8)), (16, (4, 8, 16)), (30, (8, 15, 30)), (5, (5,))],
)
def test_the_rungs(samples: int, expected: tuple[int, ...]) -> None:
    assert rungs(samples) == expected


def share_stopped(shift: float, samples: int = 30, races: int = 3000) -> float:
    """Share of races that a trial loses whose mean difference over all samples is exactly ``shift``."""
    rng = np.random.default_rng(0)
    early = rungs(samples)[:-1]
    stopped = 0
    for _ in range(races):
        differences = rng.normal(size=samples)
        differences += shift - differences.mean()
        stopped += any(lost(differences[:rung], samples, len(early)) for rung in early)
    return stopped / races


def test_an_equal_is_stopped_no_more_often_than_promised() -> None:
    assert 0.2 * ERROR_RATE < share_stopped(0.0) <= ERROR_RATE + 0.01


def test_a_hopeless_one_is_stopped() -> None:
    assert share_stopped(-2.0) > 0.95


def test_a_better_one_is_hardly_ever_stopped() -> None:
    assert share_stopped(0.5) < 0.005


def test_constant_differences_need_no_bound() -> None:
    assert lost(np.full(4, -1e-6), 16, 2)
    assert not lost(np.zeros(4), 16, 2)
