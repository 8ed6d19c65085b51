"""Retunes: searches for a strategy, followed from the event loop until they end.

Only one runs at a time. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import grpc
import structlog

from vflow_client.v1 import strategies_pb2
from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.engine import Engine, Ticket, WorkCancelled
from vflow_server.kv.manager import KVCacheManager
from vflow_server.rpc.errors import (
    InvalidRequest,
    ServiceError,
    foreseen,
    incident,
    operation_cancelled,
    operation_interrupted,
    server_stopping,
)
from vflow_server.strategies.history import Provenance
from vflow_server.strategies.strategies import StrategyRevision, StrategyStore
from vflow_server.strategies.strategy_message import bare_message, revision_message
from vflow_server.tuning.operations import Operation, OperationStore
from vflow_server.tuning.search import Search, SearchProgress
from vflowopt.compression.strategy import StrategyError
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import Calibration, Sample
from vflowopt.search.tuner import Trial, Tuner

Metadata = strategies_pb2.RetuneMetadata


@dataclass(frozen=True)
class RetuneOrder:
    """A checked request for a search.

    Attributes:
        budget: fraction of a picture's tokens to keep, averaged over the layers; between 0 and 1.
        samples: the samples that strategies are measured on.
        trials: number of strategies to try.
        seed: seed of the search.
        base: the strategy to start from.
        name: resource name of the strategy to create; empty: one is generated.
    """

    budget: float
    samples: Sequence[Sample]
    trials: int
    seed: int
    base: StrategyRevision
    name: str = ""


class Retune:
    """One running search.

    Args:
        order: the request.
        ticket: the ticket of the search on the engine.
        operation: the operation by which callers follow the search; its metadata is kept current.
        strategies: the result is added to them.
        data_digest: digest of the calibration samples.
        model_revision: revision of the model.
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
        """End the search because the service stops."""
        self._stopping = True
        self._ticket.cancel()

    async def outcome(self) -> strategies_pb2.RetuneResponse | ServiceError:
        """Follow the search to its end; returns the result or the error. The best trial so far is stored either way."""
        failure: Exception | None = None
        try:
            async for progress in self._ticket.events():
                self._note(progress)
            await self._ticket.result()
        except Exception as error:
            failure = error
        try:
            revision = await self._store_best(draft=failure is not None)
        except Exception as error:
            revision, failure = None, error
        if revision is not None:
            self.operation.metadata.best.CopyFrom(revision_message(revision, self._strategies))
        if failure is not None:
            return self._refusal(failure, "" if revision is None else revision.name)
        return strategies_pb2.RetuneResponse(strategy=self.operation.metadata.best)

    def _note(self, progress: SearchProgress) -> None:
        """Update the metadata with the progress of the search."""
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

    async def _store_best(self, *, draft: bool) -> StrategyRevision | None:
        """Store the best trial as a strategy; returns None if there is none."""
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
            code_version=version("vflowopt"),
        )
        description = f"{order.budget:.3g} of the tokens, found by {provenance.trials} trials from {order.base.name}"
        budget = f"{order.budget * 100:.4g}".replace(".", "-")
        generated = f"strategies/retuned-{budget}-{self.operation.name[-6:]}"
        # A draft does not use the requested name, which stays free for a search that completes. The name may also have
        # been taken meanwhile.
        name = generated if draft or not order.name or self._strategies.has(order.name) else order.name
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


log = structlog.get_logger(__name__)


class Retunes:
    """The retunes of one model.

    Args:
        engine: runs the searches.
        runtime: the model.
        kv: frees KV pages for them.
        encoder: encodes the samples' pictures.
        strategies: the results are added to them.
        operations: the operations by which callers follow searches.
    """

    def __init__(
        self,
        engine: Engine,
        runtime: Runtime,
        kv: KVCacheManager,
        encoder: EncoderThread,
        strategies: StrategyStore,
        operations: OperationStore,
    ) -> None:
        self._engine = engine
        self._runtime = runtime
        self._kv = kv
        self._encoder = encoder
        self._strategies = strategies
        self._operations = operations
        self._running: Retune | None = None
        self._following: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def running(self) -> Operation | None:
        """The operation of the running search; None if there is none."""
        return None if self._running is None else self._running.operation

    def check_free(self, tenant: str) -> None:
        """Check that no search is running. The refusal names one that belongs to ``tenant``, and no other.

        Raises:
            ServiceError: RETUNE_RUNNING, SERVER_STOPPING.
        """
        if self._closed:
            raise server_stopping()
        if self._running is not None:
            operation = self._running.operation
            if operation.tenant != tenant:
                raise ServiceError(
                    grpc.StatusCode.ABORTED,
                    "RETUNE_RUNNING",
                    "a search of another tenant is under way already; wait for its end",
                )
            raise ServiceError(
                grpc.StatusCode.ABORTED,
                "RETUNE_RUNNING",
                f"a search is under way already, {operation.name!r}; follow it, cancel it, or wait for its end",
                metadata={"operation": operation.name},
            )

    async def begin(self, tenant: str, order: RetuneOrder) -> Operation:
        """Start a search for ``tenant``; returns its operation once that is stored.

        Raises:
            InvalidRequest: STRATEGY_INVALID if the budget is out of range or the base does not fit the model.
            ServiceError: RETUNE_RUNNING, SERVER_STOPPING, ENGINE_FAILED, STORAGE_FAILED.
        """
        self.check_free(tenant)
        runtime = self._runtime
        calibration = Calibration(runtime, order.samples)
        try:
            tuner = Tuner(
                runtime,
                calibration,
                budget=order.budget,
                base=order.base.strategy,
                trials=order.trials,
                seed=order.seed,
            )
        except StrategyError as error:
            raise InvalidRequest("STRATEGY_INVALID", error.field, str(error)) from error
        ticket = self._engine.submit(Search(self._kv, self._encoder, calibration, tuner), tenant, background=True)
        metadata = strategies_pb2.RetuneMetadata(
            budget=order.budget,
            base=order.base.name,
            phase=strategies_pb2.RetuneMetadata.ENCODING,
            trials=order.trials,
            samples=len(order.samples),
        )
        metadata.create_time.GetCurrentTime()
        operation = self._operations.begin(tenant, metadata, ticket.cancel)
        self._running = Retune(
            order,
            ticket,
            operation,
            self._strategies,
            data_digest=calibration.digest,
            model_revision=runtime.revision,
        )
        self._following = asyncio.create_task(self._follow(self._running))
        log.info("search begun", operation=operation.name, budget=order.budget, base=order.base.name)
        try:
            await self._operations.write()
        except BaseException:  # the caller gets no operation to follow it by
            ticket.cancel()
            raise
        return operation

    async def close(self) -> None:
        """Start no more searches, and end the running one; the best strategy that it found becomes a draft."""
        self._closed = True
        if self._running is not None and self._following is not None:
            self._running.stop()
            await self._following

    async def _follow(self, retune: Retune) -> None:
        operation = retune.operation
        outcome = await retune.outcome()
        self._running = None
        if isinstance(outcome, ServiceError):
            log.info("search ended", operation=operation.name, reason=outcome.reason)
        else:
            log.info("search ended", operation=operation.name, strategy=outcome.strategy.name)
        try:
            await self._operations.end(operation, outcome.status() if isinstance(outcome, ServiceError) else outcome)
        except ServiceError:
            log.exception("the end of a search could not be written down", operation=operation.name)
