"""Conversion between strategies and the contract's ``Strategy`` message."""

from __future__ import annotations

from dataclasses import asdict

from vflow_client.v1 import strategies_pb2
from vflow_server.rpc.errors import InvalidRequest
from vflow_server.strategies.strategies import StrategyRevision, StrategyStore
from vflowopt.compression.strategy import Positions, Reserve, Strategy, thirds

Message = strategies_pb2.Strategy

BUDGET_TOLERANCE = 1e-3
"""Difference that is allowed between a budget and the ratios that are given with it."""

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


def revision_message(revision: StrategyRevision, strategies: StrategyStore) -> Message:
    """The message of a strategy that exists, with its name, history and provenance."""
    message = bare_message(revision.strategy, strategies.layers)
    message.name = revision.name
    message.description = revision.description
    message.active = revision is strategies.active
    message.built_in = revision.built_in
    message.etag = strategies.etag
    message.draft = revision.draft
    message.create_time.FromNanoseconds(int(revision.created * 1e9))
    if revision.provenance is not None:
        message.provenance.CopyFrom(strategies_pb2.Provenance(**asdict(revision.provenance)))
    for event in strategies.events(revision.name):
        added = message.events.add(kind=strategies_pb2.StrategyEvent.Kind.Value(event.kind.name), reason=event.reason)
        added.time.FromNanoseconds(int(event.time * 1e9))
    return message


def bare_message(strategy: Strategy, layers: int) -> Message:
    """The message of a strategy that has no name yet."""
    return Message(
        budget=strategy.budget(layers),
        starts=strategy.starts,
        ratios=strategy.ratios,
        threshold=strategy.threshold,
        alpha=strategy.alpha,
        grid=strategy.grid,
        positions=Message.RENUMBERED if strategy.positions == "renumbered" else Message.KEPT,
        reserve=Message.PUBLISHED if strategy.reserve == "published" else Message.OCCUPIED,
        diversity=strategy.diversity,
    )


def strategy_from(message: Message, layers: int) -> Strategy:
    """The strategy that a message describes.

    Raises:
        StrategyError: a field is wrong.
        InvalidRequest: an enum value is unknown, or the budget and the ratios differ.
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
            diversity=message.diversity,
        )
    strategy = Strategy(starts, ratios, message.threshold, message.alpha, grid, positions, reserve, message.diversity)
    budget = strategy.budget(layers)
    if message.HasField("budget") and not abs(message.budget - budget) <= BUDGET_TOLERANCE:
        raise InvalidRequest(
            "STRATEGY_INVALID",
            "strategy.budget",
            f"the ratios keep {budget:.4f} of the tokens, but budget says {message.budget:.4f}; "
            "leave budget out, or leave out the last ratio to have it solved",
        )
    return strategy
