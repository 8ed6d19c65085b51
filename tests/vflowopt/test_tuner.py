"""The search: better than where it starts, exactly on budget, repeatable, and quick to drop what has lost."""

from collections.abc import Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from demo_model.questions import held_out
from tests.vflowopt.generation import picture
from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.strategy import Strategy, StrategyError
from vflowopt.demo import model_path
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import Calibration, Comparison, Sample
from vflowopt.search.pause import Pause
from vflowopt.search.tuner import Trial, Tuner

SEED = 9_000_000
"""Far from the seeds of training, of evaluation and of the benchmarks."""


@pytest.fixture(scope="module")
def embedded() -> Iterator[Runtime]:
    runtime = Runtime.load(model_path(), kv_budget=64 << 20)
    yield runtime
    runtime.pool.check_integrity([])


def demo_samples(first_seed: int, count: int) -> list[Sample]:
    return [
        Sample(Picture.from_pixels(scene.image), tuple(question.text for question in asked))
        for scene, asked in held_out(first_seed, count, 3)
        if asked
    ]


@pytest.fixture(scope="module")
def calibration(embedded: Runtime) -> Calibration:
    return Calibration(embedded, demo_samples(SEED, 6), new_tokens=4, piece=1024)


@pytest.fixture(scope="module")
def small(embedded: Runtime) -> Calibration:
    return Calibration(embedded, demo_samples(SEED + 100, 2), new_tokens=4, piece=1024)


def trials(tuner: Tuner) -> list[Trial]:
    return [step for step in tuner.steps() if isinstance(step, Trial)]


def objective(calibration: Calibration, strategy: Strategy) -> float:
    *_, comparison = calibration.compare(strategy)
    assert isinstance(comparison, Comparison)
    return comparison.objective


def test_tuning_beats_the_preset_on_pictures_it_has_not_seen(embedded: Runtime, calibration: Calibration) -> None:
    preset = Strategy.preset(0.1, embedded.layers)
    tuner = Tuner(embedded, calibration, budget=0.1, base=preset, trials=12, seed=2)
    done = trials(tuner)
    assert [trial.number for trial in done] == list(range(1, 13)) and tuner.trials_done == tuner.trials == 12
    assert all(abs(trial.strategy.budget(embedded.layers) - 0.1) < 1e-9 for trial in done)
    assert done[0].strategy == preset and done[0].objective == tuner.base_objective
    assert tuner.base_objective == pytest.approx(objective(calibration, preset))
    best = tuner.best
    assert best is not None and not best.stopped_early
    assert best.objective == max(trial.objective for trial in done if not trial.stopped_early)
    assert best.objective == pytest.approx(objective(calibration, best.strategy), abs=1e-6)
    unseen = Calibration(embedded, demo_samples(SEED + 500, 6), new_tokens=4, piece=1024)
    for _ in unseen.prepare():
        pass
    assert objective(unseen, best.strategy) > objective(unseen, preset) + 0.01


def test_the_same_seed_leads_to_the_same_trials(embedded: Runtime, small: Calibration) -> None:
    def search(seed: int) -> list[Trial]:
        base = Strategy.preset(0.1, embedded.layers)
        return trials(Tuner(embedded, small, budget=0.1, base=base, trials=4, seed=seed))

    once = search(3)
    assert search(3) == once
    assert search(4)[1:] != once[1:]


def test_a_base_of_another_budget_is_fitted_first(embedded: Runtime, small: Calibration) -> None:
    base = Strategy.preset(0.5, embedded.layers)
    tuner = Tuner(embedded, small, budget=0.1, base=base, trials=1)
    (trial,) = trials(tuner)
    assert abs(trial.strategy.budget(embedded.layers) - 0.1) < 1e-9
    assert trial.strategy.threshold == pytest.approx(base.threshold)
    assert tuner.base_objective == pytest.approx(objective(small, base), abs=1e-6)
    assert tuner.base_objective > trial.objective == tuner.best.objective  # type: ignore[operator, union-attr]


def test_closing_keeps_the_best_so_far_and_no_page_and_one_can_go_on(runtime: Runtime) -> None:
    samples = [Sample(Picture.from_pixels(picture(56, 112, 0)), ("a", "b"))]
    base = Strategy.from_budget(0.3, runtime.layers, [0.3, 1.0])

    def search() -> Tuner:
        return Tuner(runtime, Calibration(runtime, samples, new_tokens=2, piece=40), budget=0.3, base=base, trials=2)

    undisturbed = search()
    whole = [type(step) for step in undisturbed.steps()]
    assert whole.count(Trial) == 2
    for pieces in range(1, len(whole) + 1):
        tuner = search()
        steps = tuner.steps()
        for _ in range(pieces):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
        runtime.pool.check_integrity([])
        assert tuner.trials_done == whole[:pieces].count(Trial)
        assert (tuner.best is None) == (tuner.trials_done == 0)
        list(tuner.steps())
        assert [trial.strategy for trial in tuner.finished] == [trial.strategy for trial in undisturbed.finished]
        assert tuner.base_objective == undisturbed.base_objective


class Scripted(Calibration):
    """32 samples of two questions whose cosines are known: what each new strategy is worth, in turn, and noise."""

    def __init__(self, runtime: Runtime, worth: Sequence[float], noise: float) -> None:
        super().__init__(runtime, [Sample(Picture.from_pixels(picture(56, 56, 0)), ("a", "b"))] * 32)
        self._worth = iter(worth)
        self._noise = noise
        self._rows: dict[Strategy, npt.NDArray[np.float64]] = {}
        self.runs: dict[Strategy, int] = {}

    @property
    def encoded(self) -> Any:
        cells = torch.zeros(1000, dtype=torch.int64)
        layout = TokenLayout(cells, cells, cells, structural=cells.bool(), boxes=torch.zeros(1000, 4))
        return [SimpleNamespace(layout=layout)] * len(self.samples)

    def prepare(self) -> Iterator[Pause]:
        yield None

    def cosines(
        self, strategy: Strategy, numbers: Sequence[int]
    ) -> Generator[Pause, None, list[npt.NDArray[np.float64]]]:
        yield None
        if strategy not in self._rows:
            rng = np.random.default_rng(len(self._rows))
            self._rows[strategy] = next(self._worth) + self._noise * rng.normal(size=(32, 2))
        self.runs[strategy] = self.runs.get(strategy, 0) + len(numbers)
        return [self._rows[strategy][number] for number in numbers]


def scripted(runtime: Runtime, worth: Sequence[float], noise: float) -> tuple[Tuner, Scripted, list[Trial]]:
    calibration = Scripted(runtime, worth, noise)
    base = Strategy.from_budget(0.3, runtime.layers, [0.3, 1.0])
    tuner = Tuner(runtime, calibration, budget=0.3, base=base, trials=len(worth), sampler="random")
    return tuner, calibration, trials(tuner)


def test_the_hopeless_are_stopped_after_a_quarter_of_the_samples(runtime: Runtime) -> None:
    tuner, calibration, done = scripted(runtime, [0.8, 0.5, 0.6, 0.9, 0.7], noise=0.02)
    assert [trial.stopped_early for trial in done] == [False, True, True, False, True]
    assert [trial.samples_seen for trial in done] == [32, 8, 8, 32, 8]
    assert [calibration.runs[trial.strategy] for trial in done] == [32, 8, 8, 32, 8]
    assert tuner.best == done[3]
    # The objectives given to the sampler are close to the true ones.
    assert [trial.objective for trial in done] == pytest.approx([0.8, 0.5, 0.6, 0.9, 0.7], abs=0.02)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_no_better_trial_is_stopped(runtime: Runtime, noise: float) -> None:
    """Not even where samples scatter far more than the trials differ."""
    tuner, _, done = scripted(runtime, [0.5, 0.6, 0.7, 0.8, 0.9], noise)
    assert not any(trial.stopped_early for trial in done)
    assert tuner.best == max(done, key=lambda trial: trial.objective)


def test_the_best_has_seen_all_samples(runtime: Runtime) -> None:
    rng = np.random.default_rng(0)
    tuner, _, done = scripted(runtime, rng.uniform(0.5, 0.7, 40).tolist(), noise=0.1)
    assert 0 < sum(trial.stopped_early for trial in done) < 40
    assert tuner.best == max((each for each in done if each.samples_seen == 32), key=lambda trial: trial.objective)
    assert all(trial.objective < tuner.best.objective for trial in done if trial.stopped_early)


@pytest.mark.parametrize("budget", [0.0, 1.5, 0.01])
def test_a_budget_out_of_reach_is_refused(embedded: Runtime, calibration: Calibration, budget: float) -> None:
    """Below 33 of 1312 tokens there are the ends of rows alone."""
    with pytest.raises(StrategyError) as refused:
        list(Tuner(embedded, calibration, budget=budget, base=Strategy.preset(0.1, embedded.layers)).steps())
    assert refused.value.field == "budget"


def test_what_makes_no_search_is_refused(embedded: Runtime, calibration: Calibration) -> None:
    base = Strategy.preset(0.1, embedded.layers)
    with pytest.raises(ValueError, match="gp, tpe, random, got 'grid'"):
        Tuner(embedded, calibration, budget=0.1, base=base, sampler="grid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one trial, got 0"):
        Tuner(embedded, calibration, budget=0.1, base=base, trials=0)
    with pytest.raises(StrategyError, match="starts"):
        Tuner(embedded, calibration, budget=0.1, base=Strategy((0, 99), (0.1, 1.0)))
