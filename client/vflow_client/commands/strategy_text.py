"""Strategies for people to read."""

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from vflow_client.commands.table import table
from vflow_client.quantities import counted, size
from vflow_client.v1.strategies_pb2 import ComparedStrategy, CompareStrategiesResponse, Strategy, StrategyEvent


def short(name: str) -> str:
    """The last part of a resource name."""
    return name.rpartition("/")[2]


def list_strategies(strategies: Sequence[Strategy]) -> str:
    """A table with a line for each; the active one is marked."""
    head = ("", "NAME", "BUDGET", "RATIOS", "T", "ALPHA", "GRID", "DIVERSITY", "OBJECTIVE", "ORIGIN")
    rows = [
        (
            "*" if strategy.active else "",
            short(strategy.name),
            f"{strategy.budget:.1%}",
            *_parameters(strategy),
            f"{strategy.provenance.objective:.4f}" if strategy.HasField("provenance") else "-",
            _origin(strategy),
        )
        for strategy in strategies
    ]
    return table([head, *rows], right=(2, 4, 5, 6, 7, 8))


def describe_strategy(strategy: Strategy) -> str:
    """All that is known of one, a line for each field."""
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
            ("objective", f"{found.objective:.4f}; of {short(found.base)}, where it began: {found.base_objective:.4f}"),
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
    """What it means that a strategy is active now."""
    return f"{short(strategy.name)} is active: new sessions begin with it, those that exist keep theirs"


def describe_change(first: Strategy, second: Strategy) -> str:
    """A table of what two strategies say, side by side."""
    return table([("", short(first.name), short(second.name)), *_settings(first, second)])


def describe_comparison(comparison: CompareStrategiesResponse) -> str:
    """A table of what two strategies say and what they came to on the same samples, and on which."""
    first, second = comparison.compared
    gain, points = second.objective - first.objective, 100 * (second.agreement - first.agreement)
    rows = [
        ("", short(first.strategy.name), short(second.strategy.name), "CHANGE"),
        *((*row, "") for row in _settings(first.strategy, second.strategy)),
        ("visual tokens", _tokens(first), _tokens(second), f"{second.visual_tokens - first.visual_tokens:+.1f}"),
        ("KV bytes", _kv_bytes(first), _kv_bytes(second), _difference(second.kv_bytes - first.kv_bytes)),
        ("objective", f"{first.objective:.4f}", f"{second.objective:.4f}", f"{gain:+.4f}"),
        ("agreement", f"{first.agreement:.1%}", f"{second.agreement:.1%}", f"{points:+.1f} points"),
    ]
    measured = f"{counted(comparison.samples, 'picture')} and {counted(comparison.questions, 'question')}"
    return f"{table(rows)}\nmeans over {measured} (data {comparison.data_digest[:12]})"


def _settings(first: Strategy, second: Strategy) -> list[tuple[str, str, str]]:
    rows = [("budget", f"{first.budget:.1%}", f"{second.budget:.1%}")]
    return [*rows, *zip(_PARAMETERS, _parameters(first), _parameters(second), strict=True)]


_PARAMETERS = ("ratios", "threshold t", "alpha", "grid", "diversity")


def _parameters(strategy: Strategy) -> tuple[str, str, str, str, str]:
    """The values of what `_PARAMETERS` names."""
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
