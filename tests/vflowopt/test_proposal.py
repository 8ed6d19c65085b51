"""Proposals depend on what was tried and on the seed alone."""

import logging
import pickle
from functools import partial

import numpy as np
import optuna
import pytest

from vflowopt.search.proposal import Sampler, propose
from vflowopt.search.space import Point

PEAK = np.array([0.3, 0.8])
SAMPLERS: tuple[Sampler, ...] = ("gp", "tpe", "random")


def height(point: Point) -> float:
    return float(-((np.array(point) - PEAK) ** 2).sum())


def climb(sampler: Sampler, trials: int, seed: int = 0) -> list[tuple[Point, float]]:
    tried: list[tuple[Point, float]] = []
    for _ in range(trials):
        point = propose(tried, dimensions=2, sampler=sampler, seed=seed)
        tried.append((point, height(point)))
    return tried


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_proposals_lie_in_the_cube_and_repeat_under_a_seed(sampler: Sampler) -> None:
    tried = climb(sampler, 12)
    assert all(len(point) == 2 and 0.0 <= min(point) <= max(point) <= 1.0 for point, _ in tried)
    assert len({point for point, _ in tried}) == 12
    assert climb(sampler, 12) == tried
    assert climb(sampler, 3, seed=1)[0] != tried[0]


def test_the_gaussian_process_finds_a_peak_that_chance_misses() -> None:
    best = {sampler: max(value for _, value in climb(sampler, 18)) for sampler in SAMPLERS}
    assert best["gp"] > -1e-3 > best["random"]


def test_a_proposal_can_be_made_in_another_process() -> None:
    tried = climb("random", 11)
    work = partial(propose, tried, dimensions=2, sampler="gp", seed=3)
    assert pickle.loads(pickle.dumps(work))() == work()


def test_optuna_stays_as_loud_as_it_was_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        propose([], dimensions=2, sampler="tpe", seed=0)
        assert optuna.logging.get_verbosity() == logging.INFO
    finally:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert capsys.readouterr().err == ""
