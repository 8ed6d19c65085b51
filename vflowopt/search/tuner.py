"""The search for a model's strategy at a budget, guided by the visual information flow (VFlowOpt, method section 4).

It maximises the mean cosine between the last token's hidden state behind the last layer, unpruned and pruned, over
calibration samples and all turns of their sequences. Encoded pictures and unpruned references are made once; a
trial costs pruned prefills alone, and is given up as soon as it has lost against the best one
(:mod:`vflowopt.search.racing`).

The Gaussian process is optuna's. On the embedded model (12 questions about 6 pictures, budget 10%, 5 seeds) the mean of
the best cosines after 50 trials was 0.9900 with it, 0.9900 with optuna's TPE, 0.9889 with BoTorch 0.18, 0.9865 with
scikit-optimize 0.10, 0.9850 with random points (0.9862 after 200). It also brings the fewest new dependencies beside
torch, and is maintained; scikit-optimize's repository was archived in 2024, BoTorch calls itself beta.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
import numpy.typing as npt

from vflowopt.compression.strategy import Strategy, StrategyError
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import Calibration
from vflowopt.search.pause import Aside, Pause
from vflowopt.search.proposal import Sampler, propose
from vflowopt.search.racing import lost, rungs
from vflowopt.search.space import Point, SearchSpace


@dataclass(frozen=True)
class Trial:
    """One strategy tried.

    Attributes:
        number: from 1.
        strategy: of exactly the budget.
        objective: mean cosine over all questions. Of a trial that was stopped early, an estimate: the best trial's
            objective plus the mean difference to it on the samples seen.
        samples_seen: how many samples it was run on.
        stopped_early: it lost against the best one before all samples were seen.
    """

    number: int
    strategy: Strategy
    objective: float
    samples_seen: int
    stopped_early: bool


class Tuner:
    """One search. Deterministic: the same arguments lead to the same trials, whatever happens at the pauses.

    The first trial is the base, fitted to the budget, so that on the samples the best is never worse than that. Only
    trials that saw all samples can be the best. A trial at least as good as the best so far is stopped early with a
    chance of at most :data:`vflowopt.search.racing.ERROR_RATE`; the sampler is given its estimated objective (see
    :class:`Trial`), which is as good a hint at the whole and keeps it away from there.

    Args:
        runtime: the model.
        calibration: the samples; :meth:`steps` prepares what is not prepared yet.
        budget: layer-average retention in (0, 1].
        base: where the search starts; gives the stages and every field that is not searched.
        trials: how many strategies to try, the first one included.
        seed: of the proposals, and of the order in which a trial sees the samples.
        sampler: how strategies are proposed.

    Attributes:
        trials: how many there will be.
        finished: those that are over, in order.
        best: the best of them so far; None before the first one.
        base_objective: objective of the base as it is, at its own budget; None until it is known.

    Raises:
        StrategyError: field "budget" where it is out of range; "starts" where the base does not fit the decoder.
        ValueError: there is no such sampler, or not a single trial.
    """

    def __init__(
        self,
        runtime: Runtime,
        calibration: Calibration,
        *,
        budget: float,
        base: Strategy,
        trials: int = 50,
        seed: int = 0,
        sampler: Sampler = "gp",
    ) -> None:
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler must be one of {', '.join(get_args(Sampler))}, got {sampler!r}")
        if trials < 1:
            raise ValueError(f"a search needs at least one trial, got {trials}")
        self.trials = trials
        self.finished: list[Trial] = []
        self.best: Trial | None = None
        self.base_objective: float | None = None
        self._space = SearchSpace(base, budget, runtime.layers)
        self._calibration = calibration
        self._budget = budget
        self._base = base
        self._sampler: Sampler = sampler
        self._seed = seed
        self._tried: list[tuple[Point, float]] = []
        self._best_scores: npt.NDArray[np.float64] = np.empty(0)

    @property
    def trials_done(self) -> int:
        """How many trials are over."""
        return len(self.finished)

    def steps(self) -> Generator[Pause | Trial, None, None]:
        """Search, in bounded pieces: yields each finished trial, and pauses.

        Closed early, it keeps the best so far, and can be called again to go on.

        Raises:
            StrategyError: field "budget": pictures keep more than that whatever is dropped.
            PictureError, PoolExhausted, CalibrationError: see :meth:`vflowopt.search.calibration.Calibration.prepare`.
        """
        yield from self._calibration.prepare()
        self._check_budget()
        first = self._space.fitted_base()
        if self.base_objective is None and first[1] != self._base:
            scores = yield from self._scores(self._base, np.arange(len(self._calibration.samples)))
            self.base_objective = float(scores.mean())
        while self.trials_done < self.trials:
            point, strategy = (yield from self._propose()) if self.finished else first
            trial = yield from self._try(self.trials_done + 1, strategy)
            if self.base_objective is None:
                self.base_objective = trial.objective
            self._tried.append((point, trial.objective))
            self.finished.append(trial)
            yield trial

    def _propose(self) -> Generator[Pause, None, tuple[Point, Strategy]]:
        work = partial(
            propose,
            tuple(self._tried),
            dimensions=self._space.dimensions,
            sampler=self._sampler,
            seed=self._seed,
        )
        proposal = Aside("propose", work)
        yield proposal
        point: Point = proposal.run()
        return point, self._space.strategy(point)

    def _try(self, number: int, strategy: Strategy) -> Generator[Pause, None, Trial]:
        """Run a trial, rung by rung, on samples in an order of its own."""
        order = np.random.default_rng([self._seed, number]).permutation(len(self._calibration.samples))
        ladder = rungs(len(order)) if self.best else (len(order),)
        scores = np.empty(0)
        for rung in ladder:
            more = yield from self._scores(strategy, order[len(scores) : rung])
            scores = np.concatenate((scores, more))
            if self.best and rung < len(order):
                differences = scores - self._best_scores[order[:rung]]
                if lost(differences, len(order), len(ladder) - 1):
                    estimate = self.best.objective + float(differences.mean())
                    return Trial(number, strategy, estimate, rung, stopped_early=True)
        in_place = np.empty_like(scores)
        in_place[order] = scores
        trial = Trial(number, strategy, float(in_place.mean()), len(order), stopped_early=False)
        if self.best is None or trial.objective > self.best.objective:
            self.best, self._best_scores = trial, in_place
        return trial

    def _scores(
        self, strategy: Strategy, numbers: npt.NDArray[np.int64]
    ) -> Generator[Pause, None, npt.NDArray[np.float64]]:
        """What each of some samples adds to the objective, which is the mean of this over all samples."""
        cosines = yield from self._calibration.cosines(strategy, numbers.tolist())
        # Every question counts alike, so a sample counts by how many it has.
        sums: npt.NDArray[np.float64] = np.array([each.sum() for each in cosines])
        return sums / float(self._calibration.turns.mean())

    def _check_budget(self) -> None:
        for sample, encoded in zip(self._calibration.samples, self._calibration.encoded, strict=True):
            tokens, structural = len(encoded.layout), int(encoded.layout.structural.sum())
            if self._budget * tokens < min(structural + 1, tokens):
                raise StrategyError(
                    "budget",
                    f"{self._budget:g} is out of reach: of the {tokens} tokens of picture {sample.picture.digest[:12]} "
                    f"{structural} are structural and always kept; ask for at least {(structural + 1) / tokens:.3g}",
                )
