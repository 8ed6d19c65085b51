"""The requests about strategies: shared by the synchronous and the asyncio client."""

from collections.abc import Sequence
from typing import Literal

from vflow_client.calibration import CalibrationSource, to_calibration
from vflow_client.names import strategy_name
from vflow_client.v1.strategies_pb2 import CompareStrategiesRequest, CreateStrategyRequest, RetuneRequest, Strategy


def create_strategy_request(
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
) -> CreateStrategyRequest:
    """The request for a new strategy; the arguments are the fields of the contract's `Strategy`.

    Raises:
        ValueError: `positions` or `reserve` has an unknown value, or a number is outside the range of its field.
    """
    strategy = Strategy(
        description=description,
        budget=budget,
        starts=starts,
        ratios=ratios,
        threshold=threshold,
        alpha=alpha,
        grid=grid,
        diversity=diversity,
        positions=Strategy.Positions.Value(positions.upper()),
        reserve=Strategy.Reserve.Value(reserve.upper()),
    )
    return CreateStrategyRequest(strategy_id=strategy_id, strategy=strategy)


def retune_request(
    budget: float,
    calibration: CalibrationSource,
    *,
    trials: int | None = None,
    seed: int = 0,
    base: str | None = None,
    strategy_id: str = "",
) -> RetuneRequest:
    """The request for a search; the arguments are the fields of the contract's `RetuneRequest`.

    Raises:
        OSError: a picture's path that cannot be read.
        TypeError: a picture that is no `ImageSource`.
        ValueError: a number is outside the range of its field.
    """
    return RetuneRequest(
        budget=budget,
        calibration=to_calibration(calibration),
        trials=trials or 0,
        seed=seed,
        base=strategy_name(base),
        strategy_id=strategy_id,
    )


def compare_strategies_request(first: str, second: str, calibration: CalibrationSource) -> CompareStrategiesRequest:
    """The request for a comparison of two strategies; raises as `retune_request` does."""
    return CompareStrategiesRequest(
        names=[strategy_name(first), strategy_name(second)], calibration=to_calibration(calibration)
    )
