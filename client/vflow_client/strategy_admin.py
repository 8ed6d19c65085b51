"""The strategies of a service, synchronously."""

from collections.abc import Iterator, Sequence
from typing import Literal

import grpc
from google.longrunning.operations_pb2 import (
    GetOperationRequest,
    ListOperationsRequest,
    ListOperationsResponse,
    Operation,
)
from google.longrunning.operations_pb2_grpc import OperationsStub

from vflow_client.calibration import CalibrationSource
from vflow_client.caller import Caller
from vflow_client.names import OPERATIONS, operation_name, strategy_name
from vflow_client.retune import Retune
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


class StrategyAdmin:
    """Lists, creates, activates, searches for and compares strategies.

    A strategy is named in full (`strategies/preset-10`) or by the last part.
    """

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        """For `Client.strategies`."""
        self._stub = StrategiesStub(channel)
        self._operations = OperationsStub(channel)
        self._caller = caller

    def list(self, *, timeout: float | None = None) -> Iterator[Strategy]:
        """Yields all strategies, page by page; `timeout` is for each page."""
        request = ListStrategiesRequest()
        while True:
            page: ListStrategiesResponse = self._caller.unary(
                self._stub.ListStrategies, request, timeout, repeatable=True
            )
            yield from page.strategies
            if not page.next_page_token:
                return
            request = ListStrategiesRequest(page_token=page.next_page_token)

    def get(self, name: str, *, timeout: float | None = None) -> Strategy:
        """Reads a strategy. Raises StrategyNotFound if there is none with that name."""
        request = GetStrategyRequest(name=strategy_name(name))
        strategy: Strategy = self._caller.unary(self._stub.GetStrategy, request, timeout, repeatable=True)
        return strategy

    def create(
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
        strategy: Strategy = self._caller.unary(self._stub.CreateStrategy, request, timeout, repeatable=False)
        return strategy

    def activate(self, name: str, *, etag: str = "", timeout: float | None = None) -> Strategy:
        """Makes a strategy the default of new sessions.

        Raises:
            StrategyNotFound: there is none with that name.
            EtagMismatch: `etag` was given, and the active strategy has changed since it was read.
        """
        request = ActivateStrategyRequest(name=strategy_name(name), etag=etag)
        # With an etag, a second attempt would be refused because the first one changed the active strategy.
        strategy: Strategy = self._caller.unary(self._stub.ActivateStrategy, request, timeout, repeatable=not etag)
        return strategy

    def rollback(self, *, etag: str = "", timeout: float | None = None) -> Strategy:
        """Activates the strategy that was active before the present one, and returns it. Sessions are not affected.

        Raises:
            NothingToRollBack: no other strategy was active before.
            EtagMismatch: `etag` was given, and the active strategy has changed since it was read.
        """
        request = RollbackStrategyRequest(etag=etag)
        # A second attempt could roll back one strategy too far or, with an etag, be refused because of the first.
        strategy: Strategy = self._caller.unary(self._stub.RollbackStrategy, request, timeout, repeatable=False)
        return strategy

    def retune(
        self,
        budget: float,
        calibration: CalibrationSource,
        *,
        trials: int | None = None,
        seed: int = 0,
        base: str | None = None,
        strategy_id: str = "",
        timeout: float | None = None,
    ) -> Retune:
        """Starts a search for the strategy that preserves the answers to calibration samples best within a budget.

        Args:
            budget: fraction of a picture's tokens to keep, averaged over the decoder layers, above 0 and below 1.
            calibration: samples (`load_samples()` reads a folder), or `LiveTraffic()`.
            trials: strategies to try; None: the service's default.
            seed: the same request with the same seed finds the same strategy.
            base: strategy to start from; None: the active one.
            strategy_id: last part of the new strategy's name; empty: the service chooses one.
            timeout: seconds until the search has started; None: the client's.

        Returns:
            The search: iterate over it for its progress; `result()` waits for its strategy.

        Raises:
            RetuneRunning: another search runs; its `metadata["operation"]` names it, if it is one of the tenant.
            CalibrationUnavailable: the service has no live traffic.
            StrategyNotFound: there is no strategy `base`.
            StrategyExists: `strategy_id` belongs to another strategy.
            InvalidRequest: a field is wrong (see `fields`), a picture cannot be used, or the budget cannot be met.
        """
        request = retune_request(budget, calibration, trials=trials, seed=seed, base=base, strategy_id=strategy_id)
        # Not repeatable: if a lost attempt has started the search, the next one is refused because of that search.
        operation: Operation = self._caller.unary(self._stub.Retune, request, timeout, repeatable=False)
        return Retune(operation, self._operations, self._caller)

    def compare(
        self, first: str, second: str, calibration: CalibrationSource, *, timeout: float | None = None
    ) -> CompareStrategiesResponse:
        """Compares two strategies with each other and with the unpruned model, on the same samples.

        The service compares in spare time between conversations: choose a `timeout` (seconds; None: the client's) that
        grows with the number of samples.

        Raises:
            StrategyNotFound: one of the two does not exist.
            CalibrationUnavailable: the service has no live traffic.
            InvalidRequest: a sample is wrong (see `fields`).
        """
        request = compare_strategies_request(first, second, calibration)
        # Live traffic is consumed by the first attempt that reads it.
        repeatable = request.calibration.WhichOneof("source") == "samples"
        response: CompareStrategiesResponse = self._caller.unary(
            self._stub.CompareStrategies, request, timeout, repeatable=repeatable
        )
        return response

    def operation(self, name: str, *, timeout: float | None = None) -> Retune:
        """Finds a search again by its name, in full (`operations/...`) or its last part.

        Raises:
            OperationNotFound: it never started, was deleted, or belongs to another tenant.
        """
        request = GetOperationRequest(name=operation_name(name))
        operation: Operation = self._caller.unary(self._operations.GetOperation, request, timeout, repeatable=True)
        return Retune(operation, self._operations, self._caller)

    def operations(self, *, timeout: float | None = None) -> Iterator[Retune]:
        """Yields all searches that the service stores, page by page; `timeout` is for each page."""
        request = ListOperationsRequest(name=OPERATIONS)
        while True:
            page: ListOperationsResponse = self._caller.unary(
                self._operations.ListOperations, request, timeout, repeatable=True
            )
            for operation in page.operations:
                yield Retune(operation, self._operations, self._caller)
            if not page.next_page_token:
                return
            request = ListOperationsRequest(name=OPERATIONS, page_token=page.next_page_token)
