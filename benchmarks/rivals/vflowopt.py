"""VFlowOpt itself, and what it is without one of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from benchmarks.rivals.divprune import DivPrune
from benchmarks.rivals.idpruner import IdPruner
from benchmarks.rivals.method import Compressed, Method, ScoringMethod, Sight, keep_best
from benchmarks.rivals.scope import Scope
from vflowopt.compression.diversity import diversified
from vflowopt.compression.pipeline import CompressedImage, CompressionTimings, EncodedImage, compress, score
from vflowopt.compression.pruning import stage_targets
from vflowopt.compression.strategy import PUBLISHED, Strategy
from vflowopt.runtime.model_runner import Runtime

Change = Callable[[Strategy], Strategy]


class VFlowOpt(Method):
    """The library's own compression (arXiv 2508.05211), with a strategy for each retention.

    Args:
        name: its name in tables; begins with "vflowopt".
        strategies: by retention; empty: the published ones, fitted to the model. Between and below them see
            :func:`fitted`.
        change: applied to each strategy, for ablations.
    """

    def __init__(
        self,
        name: str = "vflowopt",
        strategies: Mapping[float, Strategy] = MappingProxyType({}),
        change: Change = lambda strategy: strategy,
    ) -> None:
        self.name = name
        self._strategies = strategies
        self._change = change

    def strategy(self, retention: float, layers: int) -> Strategy:
        """The strategy that is used at a retention."""
        strategies = self._strategies or {budget: Strategy.preset(budget, layers) for budget in PUBLISHED}
        return self._change(fitted(strategies, retention, layers))

    def varied(self, part: str, change: Change) -> VFlowOpt:
        """The same with each strategy changed in one part, which the name says."""
        return type(self)(f"{self.name}-{part}", self._strategies, lambda each: change(self._change(each)))

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        strategies = [self.strategy(retention, runtime.layers) for retention in retentions]
        return [Compressed(compress(sight.encoded, each, runtime.layers), each) for each in strategies]


class LeanRows(Method):
    """VFlowOpt without recycling that drops the row end of a row none of whose tokens is kept, in each stage.

    The places so freed go to the next important tokens: one whose row has no other token takes two, its own and its
    row end's. It stands beside the base without recycling, which keeps all row ends.

    Args:
        name: its name in tables.
        base: whose strategies it uses.
    """

    def __init__(self, name: str, base: VFlowOpt) -> None:
        self.name = name
        self._base = base

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        strategies = [replace(self._base.strategy(each, runtime.layers), grid=None) for each in retentions]
        return [
            _without_empty_rows(sight.encoded, _order(sight.encoded, each), each, runtime.layers) for each in strategies
        ]


class Staged(Method):
    """The choice of another method, kept in the stages of VFlowOpt instead of the same tokens in all layers.

    Args:
        choice: ranks the tokens.
        base: whose stages are used.
        lean_rows: whether the row ends of emptied rows are dropped, as by :class:`LeanRows`.
    """

    def __init__(self, choice: ScoringMethod, base: VFlowOpt, *, lean_rows: bool = False) -> None:
        self.name = f"{choice.name}-staged{'-lean-rows' if lean_rows else ''}"
        self._choice = choice
        self._base = base
        self._lean_rows = lean_rows

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        encoded, layers = sight.encoded, runtime.layers
        of_base = [self._base.strategy(each, layers) for each in retentions]
        strategies = [Strategy(each.starts, each.ratios) for each in of_base]
        structural = int(encoded.layout.structural.sum())
        # Each dropped row end leaves a place for one more token.
        most = max(
            stage_targets(each, len(encoded.layout), structural, layers)[0] - (0 if self._lean_rows else structural)
            for each in strategies
        )
        scores = self._choice.scores(runtime, sight, min(most, len(encoded.layout) - structural))
        keep = _without_empty_rows if self._lean_rows else keep_best
        return [keep(encoded, scores, each, layers) for each in strategies]


def own(brought: Mapping[str, Strategy], layers: int) -> list[VFlowOpt]:
    """The published strategies, and those that a model brings: ``diverse-10`` and ``diverse-25`` are one method."""
    by_stem: dict[str, dict[float, Strategy]] = {}
    for name, strategy in brought.items():
        stem, _, percent = name.rpartition("-")
        budget = round(strategy.budget(layers), 6)
        by_stem.setdefault(stem if percent.isdigit() else name, {})[budget] = strategy
    return [*(VFlowOpt(f"vflowopt-{stem}", strategies) for stem, strategies in by_stem.items()), VFlowOpt()]


def fitted(strategies: Mapping[float, Strategy], retention: float, layers: int) -> Strategy:
    """The strategy for a retention; where there is none the next one above it, with its first ratio scaled down."""
    if retention == 1.0:
        return Strategy.full()
    if retention in strategies:
        return strategies[retention]
    nearest = min((budget for budget in strategies if budget > retention), default=max(strategies))
    model = strategies[nearest]
    if len(model.ratios) == 1:
        return replace(model, ratios=(retention,))
    first, *rest = model.ratios[:-1]
    leading = (min(1.0, first * retention / nearest), *rest)
    last = Strategy.from_budget(retention, layers, leading, starts=model.starts).ratios[-1]
    return replace(model, ratios=(*leading, last))


def ablations(base: VFlowOpt, layers: int) -> list[Method]:
    """``base`` with one part left out, or put in where it has none."""
    return [
        base.varied("no-focus-set", lambda each: replace(each, threshold=0.0)),
        base.varied("with-entropy", lambda each: replace(each, alpha=0.1)),
        base.varied("no-recycling", lambda each: replace(each, grid=None)),
        base.varied("with-recycling", lambda each: replace(each, grid=4.0)),
        base.varied("published-reserve", lambda each: replace(each, reserve="published")),
        base.varied("single-stage", lambda each: _single_stage(each, layers)),
        base.varied("renumbered", lambda each: replace(each, positions="renumbered")),
        base.varied("no-diversity", lambda each: replace(each, diversity=0.0)),
        base.varied("with-diversity", lambda each: replace(each, diversity=0.7)),
        LeanRows(f"{base.name}-lean-rows", base),
    ]


def choices(base: VFlowOpt, layers: int) -> list[Method]:
    """What chooses the tokens, apart from where they are kept: ``base`` and the methods that value diversity.

    Each in one stage, in the stages of ``base``, and in these without the row ends of emptied rows.
    """
    methods: list[Method] = [
        base.varied("single-stage", lambda each: _single_stage(each, layers)),
        LeanRows(f"{base.name}-lean-rows", base),
    ]
    for choice in (DivPrune(), Scope(), IdPruner()):
        methods += [choice, Staged(choice, base), Staged(choice, base, lean_rows=True)]
    return methods


def curves(base: VFlowOpt, layers: int) -> list[Method]:
    """``base`` with one hyperparameter moved through its range; the name says which."""
    methods: list[Method] = []
    for threshold in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 50.0):
        methods.append(base.varied(f"threshold-{threshold:g}", _to(threshold=threshold)))
    for alpha in (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0):
        methods.append(base.varied(f"alpha-{alpha:g}", _to(alpha=alpha)))
    for side in (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 24.0):
        methods.append(base.varied(f"grid-{side:g}", _to(grid=side)))
    for diversity in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0):
        methods.append(base.varied(f"diversity-{diversity:g}", _to(diversity=diversity)))
    for share in (1.0, 1.2, 1.5):
        methods.append(base.varied(f"first-stage-{share:g}", _front_loading(share, layers)))
    return methods


def _to(**fields: float) -> Change:
    return lambda each: replace(each, **fields)


def _front_loading(share: float, layers: int) -> Change:
    return lambda each: _front_loaded(each, share, layers)


def _single_stage(strategy: Strategy, layers: int) -> Strategy:
    return replace(strategy, starts=(0,), ratios=(strategy.budget(layers),))


def _front_loaded(strategy: Strategy, share: float, layers: int) -> Strategy:
    """The same budget, ``share`` times the average in the first stage, and as much in the second where it fits."""
    budget = strategy.budget(layers)
    if len(strategy.starts) != 3 or budget == 1.0:
        return strategy
    first = strategy.spans(layers)[0]
    opening = min(1.0, share * budget)
    later = (budget * layers - opening * first) / (layers - first)
    return replace(strategy, ratios=(opening, min(1.0, later / opening), 1.0))


def _order(encoded: EncodedImage, strategy: Strategy) -> Tensor:
    """Scores [N] that rank all tokens as the strategy does."""
    layout, scores = encoded.layout, score(encoded, strategy)
    if not strategy.diversity:
        return scores
    every = int((~layout.structural).sum())
    return diversified(scores, encoded.entering, layout.structural, every, strategy.diversity)


def _without_empty_rows(encoded: EncodedImage, scores: Tensor, strategy: Strategy, layers: int) -> Compressed:
    layout = encoded.layout
    targets = stage_targets(strategy, len(layout), int(layout.structural.sum()), layers)
    kept = tuple(_best_with_row_ends(encoded, scores, target) for target in targets)
    return Compressed(
        CompressedImage(
            digest=encoded.digest,
            layout=layout,
            importance=scores,
            kept=kept,
            recycled=kept[0][:0],
            embeddings=encoded.embeddings[kept[0].to(encoded.embeddings.device)],
            positions=encoded.places[..., kept[0]],
            span=encoded.span,
            timings=CompressionTimings(encoded.encode_ms, 0.0, 0.0),
            detail=encoded.detail,
        ),
        strategy,
    )


def _best_with_row_ends(encoded: EncodedImage, scores: Tensor, count: int) -> Tensor:
    """The most important tokens and the ends of their rows, at most ``count`` in all: int64, ascending."""
    layout = encoded.layout
    lines = list(zip(layout.grid.tolist(), layout.row.tolist(), strict=True))
    ends = {lines[index]: index for index in layout.structural.nonzero().flatten().tolist()}
    kept: set[int] = set()
    for index in scores.masked_fill(layout.structural, -torch.inf).argsort(descending=True, stable=True).tolist():
        wanted = {index, ends.get(lines[index], index)} - kept
        if len(kept) + len(wanted) > count:
            break
        kept |= wanted
    return torch.tensor(sorted(kept))
