"""The contract's ``Strategies`` service: the administration of strategies."""

from __future__ import annotations

from typing import Any

import grpc

from vflow.v1 import strategies_pb2, strategies_pb2_grpc
from vflow_server.errors import InvalidRequest
from vflow_server.names import check_identifier, check_name
from vflow_server.paging import Pager
from vflow_server.strategies import StrategyRevision, StrategyStore
from vflow_server.strategy_message import revision_message, strategy_from

Context = grpc.aio.ServicerContext[Any, Any]
LONGEST_DESCRIPTION = 500


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

    async def GetStrategy(
        self, request: strategies_pb2.GetStrategyRequest, context: Context
    ) -> strategies_pb2.Strategy:
        """Read a strategy."""
        return self._message(self._strategies.get(check_name(request.name, "strategies", "name")))

    async def CreateStrategy(
        self, request: strategies_pb2.CreateStrategyRequest, context: Context
    ) -> strategies_pb2.Strategy:
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
        strategy = strategy_from(request.strategy, self._strategies.layers)
        return self._message(await self._strategies.create(name, strategy, description))

    async def ActivateStrategy(
        self, request: strategies_pb2.ActivateStrategyRequest, context: Context
    ) -> strategies_pb2.Strategy:
        """Make a strategy the default of new sessions."""
        name = check_name(request.name, "strategies", "name")
        return self._message(await self._strategies.activate(name, request.etag))

    async def RollbackStrategy(
        self, request: strategies_pb2.RollbackStrategyRequest, context: Context
    ) -> strategies_pb2.Strategy:
        """Make the strategy active again that was so before the active one."""
        return self._message(await self._strategies.roll_back(request.etag, "RollbackStrategy was called"))

    def _message(self, revision: StrategyRevision) -> strategies_pb2.Strategy:
        return revision_message(revision, self._strategies)
