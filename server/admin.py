"""The contract's ``Strategies`` service: the administration of strategies."""

from __future__ import annotations

from typing import Any

import grpc

from vflow.v1 import strategies_pb2, strategies_pb2_grpc
from vflow_server.errors import InvalidRequest
from vflow_server.names import check_identifier, check_name
from vflow_server.paging import Pager
from vflow_server.strategies import StrategyRevision, StrategyStore
from vflowopt.strategy import Positions, Reserve, Strategy, thirds

Context = grpc.aio.ServicerContext[Any, Any]
Message = strategies_pb2.Strategy

LONGEST_DESCRIPTION = 500
BUDGET_TOLERANCE = 1e-3

_POSITIONS: dict[int, Positions] = {
    Message.POSITIONS_UNSPECIFIED: "kept",
    Message.KEPT: "kept",
    Message.RENUMBERED: "renumbered",
}
_RESERVES: dict[int, Reserve] = {
    Message.RESERVE_UNSPECIFIED: "occupied",
    Message.OCCUPIED: "occupied",
    Message.PUBLISHED: "published",
}


class Strategies(strategies_pb2_grpc.StrategiesServicer):
    """Between the contract's messages and the strategies that exist."""

    def __init__(self, strategies: StrategyStore) -> None:
        self._strategies = strategies
        self._pager = Pager()

    async def ListStrategies(
        self, request: strategies_pb2.ListStrategiesRequest, context: Context
    ) -> strategies_pb2.ListStrategiesResponse:
        """List the strategies: those built in, then those created, oldest first."""
        page, token = self._pager.page(
            self._strategies, lambda revision: revision.sequence, request.page_size, request.page_token
        )
        return strategies_pb2.ListStrategiesResponse(strategies=map(self._message, page), next_page_token=token)

    async def GetStrategy(self, request: strategies_pb2.GetStrategyRequest, context: Context) -> Message:
        """Read a strategy."""
        return self._message(self._strategies.get(check_name(request.name, "strategies", "name")))

    async def CreateStrategy(self, request: strategies_pb2.CreateStrategyRequest, context: Context) -> Message:
        """Create a strategy by its ratios, or by a budget and all ratios but the last."""
        name = f"strategies/{check_identifier(request.strategy_id, 'strategy_id')}"
        description = request.strategy.description
        if len(description) > LONGEST_DESCRIPTION:
            raise InvalidRequest(
                "OPTION_OUT_OF_RANGE",
                "strategy.description",
                f"the description has {len(description)} characters; give at most {LONGEST_DESCRIPTION}",
                metadata={"value": len(description), "max": LONGEST_DESCRIPTION},
            )
        strategy = _strategy(request.strategy, self._strategies.layers)
        return self._message(await self._strategies.create(name, strategy, description))

    async def ActivateStrategy(self, request: strategies_pb2.ActivateStrategyRequest, context: Context) -> Message:
        """Make a strategy the default of new sessions."""
        name = check_name(request.name, "strategies", "name")
        return self._message(await self._strategies.activate(name, request.etag))

    def _message(self, revision: StrategyRevision) -> Message:
        strategy = revision.strategy
        message = Message(
            name=revision.name,
            description=revision.description,
            budget=strategy.budget(self._strategies.layers),
            starts=strategy.starts,
            ratios=strategy.ratios,
            threshold=strategy.threshold,
            alpha=strategy.alpha,
            grid=strategy.grid,
            positions=Message.RENUMBERED if strategy.positions == "renumbered" else Message.KEPT,
            reserve=Message.PUBLISHED if strategy.reserve == "published" else Message.OCCUPIED,
            active=revision is self._strategies.active,
            built_in=revision.built_in,
            etag=self._strategies.etag,
        )
        message.create_time.FromNanoseconds(int(revision.created * 1e9))
        return message


def _strategy(message: Message, layers: int) -> Strategy:
    """The strategy that a message describes.

    Raises:
        StrategyError: a field is wrong.
        InvalidRequest: an enum value is unknown, or the budget contradicts the ratios.
    """
    positions, reserve = _POSITIONS.get(message.positions), _RESERVES.get(message.reserve)
    if positions is None or reserve is None:
        field = "positions" if positions is None else "reserve"
        raise InvalidRequest(
            "STRATEGY_INVALID", f"strategy.{field}", f"this server does not know that value of {field}"
        )
    starts = tuple(message.starts) or thirds(layers)
    ratios = tuple(message.ratios)
    grid = message.grid if message.HasField("grid") else None
    if message.HasField("budget") and len(ratios) == len(starts) - 1:
        return Strategy.from_budget(
            message.budget,
            layers,
            ratios,
            starts=starts,
            threshold=message.threshold,
            alpha=message.alpha,
            grid=grid,
            positions=positions,
            reserve=reserve,
        )
    strategy = Strategy(starts, ratios, message.threshold, message.alpha, grid, positions, reserve)
    budget = strategy.budget(layers)
    if message.HasField("budget") and not abs(message.budget - budget) <= BUDGET_TOLERANCE:
        raise InvalidRequest(
            "STRATEGY_INVALID",
            "strategy.budget",
            f"the ratios keep {budget:.4f} of the tokens, but budget says {message.budget:.4f}; "
            "leave budget out, or leave out the last ratio to have it solved",
        )
    return strategy
