"""The strategies of a service, synchronously."""

from collections.abc import Iterator, Sequence
from typing import Literal

import grpc

from vflow.v1.strategies_pb2 import (
    ActivateStrategyRequest,
    GetStrategyRequest,
    ListStrategiesRequest,
    ListStrategiesResponse,
    Strategy,
)
from vflow.v1.strategies_pb2_grpc import StrategiesStub
from vflow_client.caller import Caller
from vflow_client.names import strategy_name
from vflow_client.strategy_request import create_strategy_request


class StrategyAdmin:
    """Lists, creates and activates strategies, named in full (`strategies/preset-10`) or by the last part."""

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        """For `Client.strategies`."""
        self._stub = StrategiesStub(channel)
        self._caller = caller

    def list(self, *, timeout: float | None = None) -> Iterator[Strategy]:
        """All strategies, read page by page; `timeout` is for each page."""
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
        """Reads a strategy. Raises StrategyNotFound if there is none of that name."""
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
            positions=positions,
            reserve=reserve,
            description=description,
        )
        strategy: Strategy = self._caller.unary(self._stub.CreateStrategy, request, timeout, repeatable=False)
        return strategy

    def activate(self, name: str, *, etag: str = "", timeout: float | None = None) -> Strategy:
        """Makes a strategy the default of new sessions.

        Raises:
            StrategyNotFound: there is none of that name.
            EtagMismatch: `etag` was given, and the active strategy has changed since it was read.
        """
        request = ActivateStrategyRequest(name=strategy_name(name), etag=etag)
        # With an etag, a second attempt would be refused for the change that the first one made.
        strategy: Strategy = self._caller.unary(self._stub.ActivateStrategy, request, timeout, repeatable=not etag)
        return strategy
