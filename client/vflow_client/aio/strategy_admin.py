"""The strategies of a service, for asyncio."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Literal

import grpc
from google.longrunning.operations_pb2 import (
    GetOperationRequest,
    ListOperationsRequest,
    ListOperationsResponse,
    Operation,
)
from google.longrunning.operations_pb2_grpc import OperationsStub

from vflow_client.aio.caller import AsyncCaller
from vflow_client.aio.retune import AsyncRetune
from vflow_client.calibration import CalibrationSource
from vflow_client.names import OPERATIONS, operation_name, strategy_name
from vflow_client.strategy_request import compare_strategies_request, create_strategy_request, retune_request
from vflow_client.v1.strategies_pb2 import (
    ActivateStrategyRequest,
    CompareStrategiesResponse,
    GetStrategyRequest,
    ListStrategiesRequest,
    ListStrategiesResponse,
    RollbackStrategyRequest,
    Strategy,
)
from vflow_client.v1.strategies_pb2_grpc import StrategiesStub


class AsyncStrategyAdmin:
    """Lists, creates, activates, searches for and compares strategies.

    A strategy is named in full (`strategies/preset-10`) or by the last part.
    """

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        """For `AsyncClient.strategies`."""
        self._stub = StrategiesStub(channel)
        self._operations = OperationsStub(channel)
        self._caller = caller

    async def list(self, *, timeout: float | None = None) -> AsyncIterator[Strategy]:
        """All strategies, read page by page; `timeout` is for each page."""
        request = ListStrategiesRequest()
        while True:
            page: ListStrategiesResponse = await self._caller.unary(
                self._stub.ListStrategies, request, timeout, repeatable=True
            )
            for strategy in page.strategies:
                yield strategy
            if not page.next_page_token:
                return
            request = ListStrategiesRequest(page_token=page.next_page_token)

    async def get(self, name: str, *, timeout: float | None = None) -> Strategy:
        """Reads a strategy. Raises StrategyNotFound if there is none of that name."""
        request = GetStrategyRequest(name=strategy_name(name))
        strategy: Strategy = await self._caller.unary(self._stub.GetStrategy, request, timeout, repeatable=True)
        return strategy

    async def create(
        self,
        strategy_id: str,
        *,
        ratios: Sequence[float],
        budget: float | None = None,
        starts: Sequence[int] = (),
        threshold: float = 0.0,
        alpha: float = 0.0,
        grid: float | None = None,
        diversity: float = 0.0,
        positions: Literal["kept", "renumbered"] = "kept",
        reserve: Literal["occupied", "published"] = "occupied",
        description: str = "",
        timeout: float | None = None,
    ) -> Strategy:
        """Creates a strategy, by all of its ratios, or by a budget and all ratios but the last.

        The arguments are the fields of the contract's `Strategy`.

        Raises:
            StrategyInvalid: a field is wrong, or no last ratio can meet the budget.
            StrategyExists: `strategy_id` belongs to another strategy.
        """
        request = create_strategy_request(
            strategy_id,
            ratios=ratios,
            budget=budget,
            starts=starts,
            threshold=threshold,
            alpha=alpha,
            grid=grid,
            diversity=diversity,
            positions=positions,
            reserve=reserve,
            description=description,
        )
        strategy: Strategy = await self._caller.unary(self._stub.CreateStrategy, request, timeout, repeatable=False)
        return strategy

    async def activate(self, name: str, *, etag: str = "", timeout: float | None = None) -> Strategy:
        """Makes a strategy the default of new sessions.

        Raises:
            StrategyNotFound: there is none of that name.
            EtagMismatch: `etag` was given, and the active strategy has changed since it was read.
        """
        request = ActivateStrategyRequest(name=strategy_name(name), etag=etag)
        # With an etag, a second attempt would be refused for the change that the first one made.
        strategy: Strategy = await self._caller.unary(
            self._stub.ActivateStrategy, request, timeout, repeatable=not etag
        )
        return strategy

    async def rollback(self, *, etag: str = "", timeout: float | None = None) -> Strategy:
        """Makes the strategy active again that was so before the active one, and returns it. Sessions keep theirs.

        Raises:
            NothingToRollBack: none was active before.
            EtagMismatch: `etag` was given, and the active strategy has changed since it was read.
        """
        request = RollbackStrategyRequest(etag=etag)
        # A second attempt could go back one strategy further than asked, or, with an etag, be refused for the first.
        strategy: Strategy = await self._caller.unary(self._stub.RollbackStrategy, request, timeout, repeatable=False)
        return strategy

    async def retune(
        self,
        budget: float,
        calibration: CalibrationSource,
        *,
        trials: int | None = None,
        seed: int = 0,
        base: str | None = None,
        strategy_id: str = "",
        timeout: float | None = None,
    ) -> AsyncRetune:
        """Begins a search for the strategy that serves calibration samples best within a budget.

        Args:
            budget: fraction of a picture's tokens to keep, averaged over the decoder layers, above 0 and below 1.
            calibration: samples (`load_samples()` reads a folder), or `LiveTraffic()`.
            trials: strategies to try; None: the service's default.
            seed: the same request with the same seed finds the same strategy.
            base: strategy to begin with; None: the active one.
            strategy_id: last part of the new strategy's name; empty: the service makes one up.
            timeout: seconds until the search has begun; None: the client's.

        Returns:
            The search as it begins: iterate over it for its progress, `result()` waits for its strategy.

        Raises:
            RetuneRunning: another search runs; its `metadata["operation"]` names it.
            CalibrationUnavailable: the service holds no live traffic.
            StrategyNotFound: there is no strategy `base`.
            StrategyExists: `strategy_id` belongs to another strategy.
            InvalidRequest: a field is wrong (see `fields`), a picture is none, or the budget cannot be reached.
        """
        request = await asyncio.to_thread(
            retune_request, budget, calibration, trials=trials, seed=seed, base=base, strategy_id=strategy_id
        )
        # Sent again after an attempt that was carried out, it would be refused for the search that this one began.
        operation: Operation = await self._caller.unary(self._stub.Retune, request, timeout, repeatable=False)
        return AsyncRetune(operation, self._operations, self._caller)

    async def compare(
        self, first: str, second: str, calibration: CalibrationSource, *, timeout: float | None = None
    ) -> CompareStrategiesResponse:
        """Holds two strategies against each other and against the unpruned model, on the same samples.

        The service does it beside its conversations: allow it a `timeout` (seconds; None: the client's) that grows with
        the samples.

        Raises:
            StrategyNotFound: there is none of one of the names.
            CalibrationUnavailable: the service holds no live traffic.
            InvalidRequest: a sample is wrong (see `fields`).
        """
        request = await asyncio.to_thread(compare_strategies_request, first, second, calibration)
        # Live traffic is used up by the attempt that gets it.
        repeatable = request.calibration.WhichOneof("source") == "samples"
        response: CompareStrategiesResponse = await self._caller.unary(
            self._stub.CompareStrategies, request, timeout, repeatable=repeatable
        )
        return response

    async def operation(self, name: str, *, timeout: float | None = None) -> AsyncRetune:
        """Finds a search again by its name, in full (`operations/...`) or its last part.

        Raises:
            OperationNotFound: it never began, was deleted, or is another tenant's.
        """
        request = GetOperationRequest(name=operation_name(name))
        operation: Operation = await self._caller.unary(
            self._operations.GetOperation, request, timeout, repeatable=True
        )
        return AsyncRetune(operation, self._operations, self._caller)

    async def operations(self, *, timeout: float | None = None) -> AsyncIterator[AsyncRetune]:
        """All searches that the service remembers, read page by page; `timeout` is for each page."""
        request = ListOperationsRequest(name=OPERATIONS)
        while True:
            page: ListOperationsResponse = await self._caller.unary(
                self._operations.ListOperations, request, timeout, repeatable=True
            )
            for operation in page.operations:
                yield AsyncRetune(operation, self._operations, self._caller)
            if not page.next_page_token:
                return
            request = ListOperationsRequest(name=OPERATIONS, page_token=page.next_page_token)
