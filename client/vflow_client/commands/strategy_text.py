"""Strategies for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from vflow_client.commands.gain import gain_of
from vflow_client.commands.output import table
from vflow_client.quantities import counted, size
from vflow_client.v1.strategies_pb2 import ComparedStrategy, CompareStrategiesResponse, Strategy, StrategyEvent

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def short(name: str) -> str:
    """The last part of a resource name."""
    return name.rpartition("/")[2]


def list_strategies(strategies: Sequence[Strategy], *, parameters: bool = True) -> Table:
    """A table with a row for each, the active one marked; without `parameters` it fits narrow terminals."""
    names = ("RATIOS", "T", "ALPHA", "GRID", "DIVERSITY") if parameters else ()
    head = ("", "NAME", "BUDGET", *names, "OBJECTIVE", "ORIGIN")
    rows = [
        (
            "*" if strategy.active else "",
            short(strategy.name),
            f"{strategy.budget:.1%}",
            *(_parameters(strategy) if parameters else ()),
            f"{strategy.provenance.objective:.4f}" if strategy.HasField("provenance") else "-",
            _origin(strategy),
        )
        for strategy in strategies
    ]
    return table(rows, head=head, right=(2, 4, 5, 6, 7, 8) if parameters else (2, 3))


def describe_strategy(strategy: Strategy) -> Table:
    """A table with a row for each field of a strategy, its provenance and its history."""
    ratios, *others = _parameters(strategy)
    rows = [
        ("name", strategy.name + (" (active)" if strategy.active else "")),
        ("origin", _origin(strategy)),
        ("created", _time(strategy.create_time)),
        ("budget", f"{strategy.budget:.1%} of the visual tokens, averaged over the decoder layers"),
        ("stages", f"from layers {', '.join(map(str, strategy.starts))}; each keeps {ratios} of those before it"),
        *zip(_PARAMETERS[1:], others, strict=True),
        ("positions", Strategy.Positions.Name(strategy.positions).lower()),
        ("reserve", Strategy.Reserve.Name(strategy.reserve).lower()),
        ("etag", strategy.etag),
    ]
    if strategy.description:
        rows.insert(1, ("description", strategy.description))
    if strategy.HasField("provenance"):
        found = strategy.provenance
        rows += [
            ("objective", f"{found.objective:.4f}; {short(found.base)}, the base: {found.base_objective:.4f}"),
            ("found by", f"{found.operation}, {found.trials} trials, {found.samples} samples, seed {found.seed}"),
            ("data", found.data_digest),
            ("model", f"{found.model_revision} (service {found.code_version})"),
        ]
    rows += [
        ("history" if number == 0 else "", f"{_time(event.time)} {_event(event)}")
        for number, event in enumerate(strategy.events)
    ]
    return table(rows)


def announce_active(strategy: Strategy) -> str:
    """What changes now that a strategy is active."""
    return f"{short(strategy.name)} is active: new sessions use it, existing sessions are not affected"


def describe_change(first: Strategy, second: Strategy) -> Table:
    """A table of the parameters of two strategies, side by side."""
    return table(_compare_parameters(first, second), head=("", short(first.name), short(second.name)))


def describe_comparison(comparison: CompareStrategiesResponse) -> RenderableType:
    """A table of the parameters and results of two strategies, and the samples on which they were compared."""
    from rich.console import Group

    first, second = comparison.compared
    gain, points = second.objective - first.objective, 100 * (second.agreement - first.agreement)
    head = ("", short(first.strategy.name), short(second.strategy.name), "CHANGE")
    rows = [
        *((*row, "") for row in _compare_parameters(first.strategy, second.strategy)),
        ("visual tokens", _tokens(first), _tokens(second), f"{second.visual_tokens - first.visual_tokens:+.1f}"),
        ("KV bytes", _kv_bytes(first), _kv_bytes(second), _difference(second.kv_bytes - first.kv_bytes)),
        ("objective", f"{first.objective:.4f}", f"{second.objective:.4f}", f"{gain:+.4f}"),
        ("agreement", f"{first.agreement:.1%}", f"{second.agreement:.1%}", f"{points:+.1f} points"),
    ]
    measured = f"{counted(comparison.samples, 'picture')} and {counted(comparison.questions, 'question')}"
    lines = [f"means over {measured} (data {comparison.data_digest[:12]})"]
    if (by_picture := gain_of(comparison)) is not None:
        lines.append(f"gain in the objective: {by_picture}")
    return Group(table(rows, head=head), *lines)


def _compare_parameters(first: Strategy, second: Strategy) -> list[tuple[str, str, str]]:
    rows = [("budget", f"{first.budget:.1%}", f"{second.budget:.1%}")]
    return [*rows, *zip(_PARAMETERS, _parameters(first), _parameters(second), strict=True)]


_PARAMETERS = ("ratios", "threshold t", "alpha", "grid", "diversity")


def _parameters(strategy: Strategy) -> tuple[str, str, str, str, str]:
    """The values of the parameters that `_PARAMETERS` names."""
    ratios = "/".join(f"{ratio:.3f}" for ratio in strategy.ratios)
    grid = f"{strategy.grid:.2f}" if strategy.HasField("grid") else "-"
    return ratios, f"{strategy.threshold:.2f}", f"{strategy.alpha:.3f}", grid, f"{strategy.diversity:.3f}"


def _origin(strategy: Strategy) -> str:
    if strategy.built_in:
        return "built in"
    if strategy.draft:
        return "draft of a cancelled search"
    return "search" if strategy.HasField("provenance") else "created"


def _time(time: Timestamp) -> str:
    return f"{time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"


def _event(event: StrategyEvent) -> str:
    kind = StrategyEvent.Kind.Name(event.kind).lower().replace("_", " ")
    return f"{kind}: {event.reason}" if event.reason else kind


def _tokens(compared: ComparedStrategy) -> str:
    return f"{compared.visual_tokens:,.1f} of {compared.visual_tokens_full:,.1f}"


def _kv_bytes(compared: ComparedStrategy) -> str:
    return f"{size(compared.kv_bytes)} of {size(compared.kv_bytes_full)}"


def _difference(count: float) -> str:
    return f"{'-' if count < 0 else '+'}{size(abs(count))}"
