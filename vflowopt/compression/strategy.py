"""Strategy: how much of a picture each stage of the decoder keeps, and by which measure.

A strategy knows nothing about a model but the number of its decoder layers, which every method that needs it takes as
an argument. It is immutable and hashable, and its JSON form is canonical: equal strategies have equal JSON.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from operator import mul
from types import MappingProxyType
from typing import Any, Literal, NoReturn, Self, get_args

SCHEMA = 2
"""Version of the JSON form that this release writes. It also reads version 1, which has no diversity."""

Positions = Literal["kept", "renumbered"]
Reserve = Literal["occupied", "published"]

# Solving for a ratio and multiplying it out again may miss by this much; it is far below one token.
_DUST = 1e-9


class StrategyError(ValueError):
    """A strategy, or a description of one, that cannot be used.

    ``field`` names the field at fault (``"strategy"`` where it is the whole); the message says what was expected.
    """

    def __init__(self, field: str, message: str) -> None:
        """Name the field at fault and say what was expected of it."""
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Strategy:
    """Pruning in stages (method section 2), the measure of importance (1) and recycling (3), as numbers.

    Raises StrategyError when a field is out of range or has the wrong type.
    """

    starts: tuple[int, ...]
    """First decoder layer of each stage: 0, then strictly ascending."""
    ratios: tuple[float, ...]
    """R_s, the fraction in (0, 1] of the visual tokens still present that stage s keeps; one per stage."""
    threshold: float = 0.0
    """Sensitivity t >= 0: tokens that receive more than t times the mean attention form the focus set."""
    alpha: float = 0.0
    """Weight in [-1, 1] of the patch entropy within the importance."""
    grid: float | None = None
    """Side a >= 1 of a recycling cell, in tokens, may be fractional. None: dropped tokens are not recycled."""
    positions: Positions = "kept"
    """"kept": a token keeps the position that it had before pruning. "renumbered": the first stage closes the gaps."""
    reserve: Reserve = "occupied"
    """Places that recycling claims: one per occupied cell, which never exceeds the budget, or the published count."""
    diversity: float = 0.0
    """Weight in [0, 1] of diversity against importance when tokens are chosen; 0: the published choice, by importance
    alone. See :mod:`vflowopt.compression.diversity`."""

    def __post_init__(self) -> None:
        """Normalise sequences and numbers, then check every field."""
        set_field = object.__setattr__
        set_field(self, "starts", tuple(_integer("starts", start) for start in _sequence("starts", self.starts)))
        set_field(self, "ratios", tuple(_number("ratios", ratio) for ratio in _sequence("ratios", self.ratios)))
        set_field(self, "threshold", _number("threshold", self.threshold))
        set_field(self, "alpha", _number("alpha", self.alpha))
        set_field(self, "diversity", _number("diversity", self.diversity))
        if self.grid is not None:
            set_field(self, "grid", _number("grid", self.grid))

        if not self.starts or self.starts[0] != 0:
            raise StrategyError("starts", f"the first stage must start at layer 0, got {_brief(self.starts)}")
        if any(later <= earlier for earlier, later in pairwise(self.starts)):
            raise StrategyError("starts", f"stages must start at strictly ascending layers, got {_brief(self.starts)}")
        if len(self.ratios) != len(self.starts):
            raise StrategyError(
                "ratios", f"expected one ratio for each of the {len(self.starts)} stages, got {len(self.ratios)}"
            )
        if not all(0.0 < ratio <= 1.0 for ratio in self.ratios):
            raise StrategyError("ratios", f"every ratio must be above 0 and at most 1, got {_brief(self.ratios)}")
        if self.threshold < 0.0:
            raise StrategyError("threshold", f"must not be negative, got {self.threshold}")
        if not -1.0 <= self.alpha <= 1.0:
            raise StrategyError("alpha", f"must lie between -1 and 1, got {self.alpha}")
        if not 0.0 <= self.diversity <= 1.0:
            raise StrategyError("diversity", f"must lie between 0 and 1, got {self.diversity}")
        if self.grid is not None and self.grid < 1.0:
            raise StrategyError("grid", f"a cell must be at least one token wide, got {self.grid}")
        _member("positions", self.positions, get_args(Positions))
        _member("reserve", self.reserve, get_args(Reserve))

    @classmethod
    def full(cls) -> Self:
        """Keep every token in every layer: the unpruned model."""
        return cls(starts=(0,), ratios=(1.0,))

    @classmethod
    def from_budget(
        cls,
        budget: float,
        layers: int,
        leading: Sequence[float],
        *,
        starts: Sequence[int] | None = None,
        threshold: float = 0.0,
        alpha: float = 0.0,
        grid: float | None = None,
        positions: Positions = "kept",
        reserve: Reserve = "occupied",
        diversity: float = 0.0,
    ) -> Self:
        """Solve the last ratio so that a decoder of ``layers`` layers meets ``budget`` (method section 2).

        ``budget`` is the layer-average retention in (0, 1]; ``leading`` holds the ratios of all stages but the last.
        Without ``starts`` the stages cut the decoder into equal parts (`thirds`).

        Raises StrategyError: field "budget" where no last ratio in (0, 1] meets the budget with these leading ratios.
        """
        budget = _number("budget", budget)
        if not 0.0 < budget <= 1.0:
            raise StrategyError("budget", f"must be above 0 and at most 1, got {budget}")
        head = tuple(_number("leading", ratio) for ratio in _sequence("leading", leading))
        if not all(0.0 < ratio <= 1.0 for ratio in head):
            raise StrategyError("leading", f"every ratio must be above 0 and at most 1, got {_brief(head)}")
        if starts is None:
            starts = thirds(layers, len(head) + 1)
        # The open last stage is carried as 1 for now: its place in the sums is what counts.
        draft = cls(tuple(starts), (*head, 1.0), threshold, alpha, grid, positions, reserve, diversity)
        spans = draft.spans(layers)
        spent = sum(fraction * span for fraction, span in zip(draft.retention[:-1], spans[:-1], strict=True))
        reach = draft.retention[-1] * spans[-1]
        if spent >= budget * layers:
            raise StrategyError(
                "budget",
                f"{budget:g} is too small: the stages before the last spend {spent / layers:.6g} already; "
                "lower the leading ratios or raise the budget",
            )
        last = (budget * layers - spent) / reach
        if last > 1.0 + _DUST:
            raise StrategyError(
                "budget",
                f"{budget:g} is too large: with these leading ratios at most {(spent + reach) / layers:.6g} is kept; "
                "raise the leading ratios or lower the budget",
            )
        return replace(draft, ratios=(*head, min(last, 1.0)))

    @classmethod
    def preset(cls, budget: float, layers: int) -> Self:
        """Fit the published strategy for ``budget`` (0.5, 0.25 or 0.1) to a decoder of ``layers`` layers.

        R1, R2, t, alpha and a are the published ones; the last ratio is solved so that the budget is met exactly.
        Raises StrategyError: field "budget" for another budget, "layers" for a decoder of fewer layers than stages.
        """
        published = PUBLISHED.get(budget)
        if published is None:
            known = ", ".join(f"{known:g}" for known in PUBLISHED)
            raise StrategyError("budget", f"there is a preset for {known}, got {budget!r}; use Strategy.from_budget")
        return cls.from_budget(
            budget,
            layers,
            published.ratios[:-1],
            starts=thirds(layers, len(published.starts)),
            threshold=published.threshold,
            alpha=published.alpha,
            grid=published.grid,
        )

    @property
    def retention(self) -> tuple[float, ...]:
        """Fraction of a picture's tokens present in the layers of each stage: the running product of the ratios."""
        return tuple(accumulate(self.ratios, mul))

    def spans(self, layers: int) -> tuple[int, ...]:
        """Count the layers of each stage, L_s. Raises StrategyError where a stage would start past the last layer."""
        self.check(layers)
        return tuple(end - start for start, end in pairwise((*self.starts, layers)))

    def budget(self, layers: int) -> float:
        """Average the retention over the layers of a decoder (method section 2): sum of retention[s] * L_s over L."""
        return sum(fraction * span for fraction, span in zip(self.retention, self.spans(layers), strict=True)) / layers

    def check(self, layers: int) -> None:
        """Raise StrategyError unless every stage starts within a decoder of ``layers`` layers."""
        _layers(layers)
        if self.starts[-1] >= layers:
            raise StrategyError(
                "starts",
                f"the last stage starts at layer {self.starts[-1]}, but the model's layers are 0 to {layers - 1}",
            )

    def to_json(self) -> str:
        """Write the canonical JSON form: sorted keys, no spaces, with the schema version."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote. Every field must be there, and no other.

        Raises StrategyError naming the field: missing, unknown, given twice, of the wrong type or out of range.
        """
        try:
            document = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except StrategyError:
            raise
        except (ValueError, RecursionError) as error:
            raise StrategyError("strategy", f"not valid JSON ({error}); expected what to_json writes") from None
        if not isinstance(document, dict):
            raise StrategyError("strategy", f"expected a JSON object, got {_brief(document)}")
        schema = document.pop("schema", None)
        if schema not in (1, SCHEMA) or isinstance(schema, bool):
            raise StrategyError("schema", f"this release reads versions 1 and {SCHEMA}, got {_brief(schema)}")
        names = {field.name for field in fields(cls)} - ({"diversity"} if schema == 1 else set())
        for name in sorted(document.keys() - names):
            raise StrategyError(name, f"unknown field, remove it; a strategy has {', '.join(sorted(names))}")
        for name in sorted(names - document.keys()):
            raise StrategyError(name, "missing; every field must be given")
        return cls(**document)


def thirds(layers: int, stages: int = 3) -> tuple[int, ...]:
    """Start ``stages`` stages evenly, as the paper does: 0, 9, 18 of 28 layers; 0, 10, 20 of 32.

    The last stage takes the remainder. Raises StrategyError where there are fewer layers than stages.
    """
    _layers(layers)
    if not 1 <= stages <= layers:
        raise StrategyError("layers", f"{layers} layers cannot be cut into {stages} stages of at least one layer")
    return tuple(stage * (layers // stages) for stage in range(stages))


def _sequence(field: str, value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise StrategyError(field, f"expected a sequence of numbers, got {_brief(value)}")
    return value


def _integer(field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise StrategyError(field, f"expected a whole number, got {_brief(value)}")
    return value


def _number(field: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise StrategyError(field, f"expected a number, got {_brief(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise StrategyError(field, "expected a finite number, got NaN or infinity")
    return number + 0.0  # -0.0 equals 0.0 but prints differently: equal strategies must have equal JSON


def _member(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise StrategyError(field, f"expected {' or '.join(map(repr, allowed))}, got {_brief(value)}")


def _layers(layers: int) -> None:
    if _integer("layers", layers) < 1:
        raise StrategyError("layers", f"a decoder has at least one layer, got {layers}")


def _brief(value: object) -> str:
    # Values come from requests: an error message must not echo megabytes of them (nor fail on a huge integer).
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "an integer beyond 64 bits"
    if isinstance(value, tuple):
        return f"({', '.join(map(_brief, value[:8]))}{', ...' if len(value) > 8 else ''})"
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        raise StrategyError(next(name for name in names if names.count(name) > 1), "given more than once")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise StrategyError("strategy", f"{name} is not a number that a strategy can hold; use a finite one")


PUBLISHED: Mapping[float, Strategy] = MappingProxyType(
    {
        budget: Strategy(
            starts=(0, 9, 18), ratios=ratios, threshold=threshold, alpha=0.0, grid=grid, reserve="published"
        )
        for budget, ratios, threshold, grid in (
            (0.5, (0.72332, 0.74875, 0.487), 28.683, 11.757),
            (0.25, (0.26510, 0.98334, 0.87733), 34.760, 15.581),
            (0.1, (0.11662, 1.0, 0.6011), 39.265, 17.387),
        )
    }
)
"""The released strategies for LLaVA-OneVision-7B, by nominal budget, number for number (method section 4).

They belong to 28 layers, where their rounded ratios come out at 50.08, 25.07 and 10.0006%: a little over the nominal
budget. `Strategy.preset` solves the last ratio instead, for any depth.
"""
