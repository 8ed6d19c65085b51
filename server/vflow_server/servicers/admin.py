"""The contract's ``Strategies`` service: the management of strategies."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import grpc
from google.longrunning import operations_pb2

from vflow_client.v1 import strategies_pb2, strategies_pb2_grpc
from vflow_server.access.caller import current_caller
from vflow_server.rpc.errors import InvalidRequest
from vflow_server.rpc.names import check_identifier, check_name
from vflow_server.rpc.paging import Pager
from vflow_server.servicers.calibration_request import CalibrationReader
from vflow_server.strategies.comparisons import Comparisons
from vflow_server.strategies.strategies import StrategyRevision, StrategyStore
from vflow_server.strategies.strategy_message import revision_message, strategy_from
from vflow_server.tuning.retune import RetuneOrder, Retunes
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import Calibration

Context = grpc.aio.ServicerContext[Any, Any]

LONGEST_DESCRIPTION = 500
MOST_TRIALS, DEFAULT_TRIALS = 1000, 50


class Strategies(strategies_pb2_grpc.StrategiesServicer):
    """Serves the strategies.

    Args:
        strategies: the strategies that exist.
        retunes: searches for new ones.
        comparisons: compares them.
        reader: reads the calibration samples of requests.
        runtime: the model.
    """

    def __init__(
        self,
        strategies: StrategyStore,
        retunes: Retunes,
        comparisons: Comparisons,
        reader: CalibrationReader,
        runtime: Runtime,
    ) -> None:
        self._strategies = strategies
        self._retunes = retunes
        self._comparisons = comparisons
        self._reader = reader
        self._runtime = runtime
        self._pager = Pager()

    async def ListStrategies(
        self, request: strategies_pb2.ListStrategiesRequest, context: Context
    ) -> strategies_pb2.ListStrategiesResponse:
        """List the strategies: those built in, then those created, oldest first."""
        page, token = self._pager.page(
            self._strategies, lambda revision: revision.number, request.page_size, request.page_token
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
        """Create a strategy from its ratios, or from a budget and all ratios but the last."""
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
        """Activate the strategy that was active before the present one."""
        return self._message(await self._strategies.roll_back(request.etag, "RollbackStrategy was called"))

    async def Retune(self, request: strategies_pb2.RetuneRequest, context: Context) -> operations_pb2.Operation:
        """Start a search for the most faithful strategy within a budget."""
        self._retunes.check_free(current_caller().tenant)
        name = ""
        if request.strategy_id:
            name = f"strategies/{check_identifier(request.strategy_id, 'strategy_id')}"
            self._strategies.check_free(name)
        order = RetuneOrder(
            budget=_budget(request.budget),
            trials=_trials(request.trials),
            seed=request.seed,
            base=self._strategies.get(check_name(request.base, "strategies", "base") if request.base else ""),
            samples=await self._reader.read(request.calibration, current_caller().tenant),
            name=name,
        )
        return (await self._retunes.begin(current_caller().tenant, order)).message()

    async def CompareStrategies(
        self, request: strategies_pb2.CompareStrategiesRequest, context: Context
    ) -> strategies_pb2.CompareStrategiesResponse:
        """Compare two strategies with the unpruned model."""
        self._comparisons.check_free()
        if len(request.names) != 2:
            raise InvalidRequest(
                "OPTION_OUT_OF_RANGE",
                "names",
                f"there are {len(request.names)} names; name two strategies",
                metadata={"value": len(request.names), "min": 2, "max": 2},
            )
        revisions = [
            self._strategies.get(check_name(name, "strategies", f"names[{index}]"))
            for index, name in enumerate(request.names)
        ]
        tenant = current_caller().tenant
        calibration = Calibration(self._runtime, await self._reader.read(request.calibration, tenant))
        compared = await self._comparisons.compare(tenant, [revision.strategy for revision in revisions], calibration)
        return strategies_pb2.CompareStrategiesResponse(
            compared=[
                strategies_pb2.ComparedStrategy(strategy=self._message(revision), **asdict(comparison))
                for revision, comparison in zip(revisions, compared, strict=True)
            ],
            samples=len(calibration.samples),
            questions=int(calibration.turns.sum()),
            data_digest=calibration.digest,
        )

    def _message(self, revision: StrategyRevision) -> strategies_pb2.Strategy:
        return revision_message(revision, self._strategies)


def _budget(budget: float) -> float:
    if not 0.0 < budget < 1.0:
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            "budget",
            f"budget is {budget:g}; give the fraction of the tokens to keep, above 0 and below 1",
            metadata={"value": budget, "min": 0, "max": 1},
        )
    return budget


def _trials(trials: int) -> int:
    if not 0 <= trials <= MOST_TRIALS:
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            "trials",
            f"trials is {trials}; give 1 to {MOST_TRIALS}, or 0 for {DEFAULT_TRIALS}",
            metadata={"value": trials, "min": 0, "max": MOST_TRIALS},
        )
    return trials or DEFAULT_TRIALS
