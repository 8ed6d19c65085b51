"""Retunes: one at a time, each begun on the engine and followed by an operation to its end.

Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio

import grpc
import structlog

from vflow.v1 import strategies_pb2
from vflow_server.engine.engine import Engine
from vflow_server.engine.workbench import Workbench
from vflow_server.rpc.errors import InvalidRequest, ServiceError, server_stopping
from vflow_server.strategies.strategies import StrategyStore
from vflow_server.tuning.operations import Operation, OperationStore
from vflow_server.tuning.retune import Retune, RetuneOrder
from vflow_server.tuning.search import Search
from vflowopt.calibration import Calibration
from vflowopt.strategy import StrategyError
from vflowopt.tuning import Tuner

log = structlog.get_logger(__name__)


class Retunes:
    """The retunes of one model.

    Args:
        engine: does the work.
        bench: what the work is done with.
        strategies: where a search's result goes.
        operations: by which searches are followed.
    """

    def __init__(self, engine: Engine, bench: Workbench, strategies: StrategyStore, operations: OperationStore) -> None:
        self._engine = engine
        self._bench = bench
        self._strategies = strategies
        self._operations = operations
        self._running: Retune | None = None
        self._following: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def running(self) -> Operation | None:
        """The operation of the search that is under way; None where none is."""
        return None if self._running is None else self._running.operation

    def check_free(self) -> None:
        """Refuse a search beside another one.

        Raises:
            ServiceError: RETUNE_RUNNING, SERVER_STOPPING.
        """
        if self._closed:
            raise server_stopping()
        if self._running is not None:
            name = self._running.operation.name
            raise ServiceError(
                grpc.StatusCode.ABORTED,
                "RETUNE_RUNNING",
                f"a search is under way already, {name!r}; follow it, cancel it, or wait for its end",
                metadata={"operation": name},
            )

    async def begin(self, tenant: str, order: RetuneOrder) -> Operation:
        """Begin a search of ``tenant``; returns once it is known to have begun even if the process ends.

        Raises:
            InvalidRequest: STRATEGY_INVALID where no strategy like the base has that budget.
            ServiceError: RETUNE_RUNNING, SERVER_STOPPING, ENGINE_FAILED.
        """
        self.check_free()
        runtime = self._bench.runtime
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
        ticket = self._engine.submit(Search(self._bench, calibration, tuner), tenant, background=True)
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
        except BaseException:  # whoever asked does not hear of it
            ticket.cancel()
            raise
        return operation

    async def close(self) -> None:
        """Begin no more, and end the one that is under way; what it has found becomes a draft."""
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
