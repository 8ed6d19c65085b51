"""A retune: a search under way, followed from the event loop until a strategy has come of it, or nothing.

Belongs to the event loop's thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from vflow.v1 import strategies_pb2
from vflow_server.engine.engine import Ticket, WorkCancelled
from vflow_server.rpc.errors import (
    InvalidRequest,
    ServiceError,
    foreseen,
    incident,
    operation_cancelled,
    operation_interrupted,
)
from vflow_server.strategies.provenance import Provenance
from vflow_server.strategies.strategies import StrategyRevision, StrategyStore
from vflow_server.strategies.strategy_message import bare_message, revision_message
from vflow_server.tuning.operations import Operation
from vflow_server.tuning.search import SearchProgress
from vflowopt.calibration import Sample
from vflowopt.strategy import StrategyError
from vflowopt.tuning import Trial

Metadata = strategies_pb2.RetuneMetadata


@dataclass(frozen=True)
class RetuneOrder:
    """What to search for, checked.

    Attributes:
        budget: fraction of a picture's tokens to keep, averaged over the layers.
        samples: what strategies are measured on.
        trials: strategies to try.
        seed: of the search.
        base: the strategy to begin with.
        name: resource name of the strategy to make; empty: made up.
    """

    budget: float
    samples: Sequence[Sample]
    trials: int
    seed: int
    base: StrategyRevision
    name: str = ""


class Retune:
    """One search under way.

    Args:
        order: what to search for.
        ticket: of the search on the engine.
        operation: by which it is followed; its metadata is kept current.
        strategies: where what it finds goes.
        data_digest: of the calibration samples.
        model_revision: of the model that is searched for.
    """

    def __init__(
        self,
        order: RetuneOrder,
        ticket: Ticket[SearchProgress, Trial],
        operation: Operation,
        strategies: StrategyStore,
        *,
        data_digest: str,
        model_revision: str,
    ) -> None:
        self.operation = operation
        self._order = order
        self._ticket = ticket
        self._strategies = strategies
        self._data_digest = data_digest
        self._model_revision = model_revision
        self._best: Trial | None = None
        self._searching_since = 0.0
        self._stopping = False

    def stop(self) -> None:
        """Ask for its end because the service ends."""
        self._stopping = True
        self._ticket.cancel()

    async def outcome(self) -> strategies_pb2.RetuneResponse | ServiceError:
        """Follow the search to its end: what came of it, or why nothing did. What was best by then is kept."""
        failure: Exception | None = None
        try:
            async for progress in self._ticket.events():
                self._note(progress)
            await self._ticket.result()
        except Exception as error:
            failure = error
        try:
            revision = await self._kept(draft=failure is not None)
        except Exception as error:
            revision, failure = None, error
        if revision is not None:
            self.operation.metadata.best.CopyFrom(revision_message(revision, self._strategies))
        if failure is not None:
            return self._refusal(failure, "" if revision is None else revision.name)
        return strategies_pb2.RetuneResponse(strategy=self.operation.metadata.best)

    def _note(self, progress: SearchProgress) -> None:
        """Let the metadata say how far the search has come."""
        metadata, trial = self.operation.metadata, progress.trial
        if progress.phase != metadata.phase:
            metadata.phase = progress.phase
            self._searching_since = time.monotonic()
        if progress.base_objective is not None:
            metadata.base_objective = progress.base_objective
        if trial is None:
            return
        metadata.tried.add(objective=trial.objective, stopped_early=trial.stopped_early)
        if not trial.stopped_early and (self._best is None or trial.objective > self._best.objective):
            self._best = trial
            metadata.best_objective = trial.objective
            metadata.best.CopyFrom(bare_message(trial.strategy, self._strategies.layers))
        done = len(metadata.tried)
        left = (time.monotonic() - self._searching_since) / done * (metadata.trials - done)
        metadata.remaining.FromMilliseconds(round(left * 1000))

    async def _kept(self, *, draft: bool) -> StrategyRevision | None:
        """The best trial as a strategy; None where there is none."""
        if (best := self._best) is None:
            return None
        metadata, order = self.operation.metadata, self._order
        provenance = Provenance(
            operation=self.operation.name,
            base=order.base.name,
            data_digest=self._data_digest,
            samples=len(order.samples),
            trials=len(metadata.tried),
            seed=order.seed,
            objective=best.objective,
            base_objective=metadata.base_objective,
            model_revision=self._model_revision,
            code_version=version("vflow"),
        )
        description = f"{order.budget:.3g} of the tokens, found by {provenance.trials} trials from {order.base.name}"
        budget = f"{order.budget * 100:.4g}".replace(".", "-")
        made_up = f"strategies/retuned-{budget}-{self.operation.name[-6:]}"
        # The name that was asked for is left for a search that comes to its end, and may be taken by now.
        name = made_up if draft or not order.name or self._strategies.has(order.name) else order.name
        return await self._strategies.create(name, best.strategy, description, draft=draft, provenance=provenance)

    def _refusal(self, failure: Exception, draft: str) -> ServiceError:
        match failure:
            case WorkCancelled() if self._stopping:
                return operation_interrupted(self.operation.name, draft)
            case WorkCancelled():
                return operation_cancelled(self.operation.name, draft)
            case StrategyError():
                return InvalidRequest("STRATEGY_INVALID", failure.field, str(failure))
        return foreseen(failure) or incident(failure, operation=self.operation.name)
