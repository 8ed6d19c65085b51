"""Building the request that creates a strategy: pure, shared by the synchronous and the asyncio face."""

from collections.abc import Sequence
from typing import Literal

from vflow.v1.strategies_pb2 import CreateStrategyRequest, Strategy


def create_strategy_request(
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
) -> CreateStrategyRequest:
    """The request for a new strategy; the arguments are the fields of the contract's `Strategy`.

    Raises:
        ValueError: `positions` or `reserve` is none of its values, or a number is outside what its field can hold.
    """
    strategy = Strategy(
        description=description,
        budget=budget,
        starts=starts,
        ratios=ratios,
        threshold=threshold,
        alpha=alpha,
        grid=grid,
        positions=positions.upper(),
        reserve=reserve.upper(),
    )
    return CreateStrategyRequest(strategy_id=strategy_id, strategy=strategy)
