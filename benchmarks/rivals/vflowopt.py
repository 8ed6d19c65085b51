"""VFlowOpt itself, and what it is without one of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.rivals.method import Compressed, Method, Sight
from vflowopt.compression import CompressedImage, CompressionTimings, EncodedImage, compress, score
from vflowopt.pruning import stage_targets
from vflowopt.runtime import Runtime
from vflowopt.strategy import PUBLISHED, Strategy

Change = Callable[[Strategy], Strategy]


class VFlowOpt(Method):
    """The library's own compression (arXiv 2508.05211), with a strategy for each retention.

    Args:
        name: what tables call it; begins with "vflowopt".
        strategies: by retention; the untuned presets where one is missing, see :func:`untuned`.
        change: applied to each strategy, for ablations.
    """

    def __init__(
        self,
        name: str = "vflowopt",
        strategies: dict[float, Strategy] | None = None,
        change: Change = lambda strategy: strategy,
    ) -> None:
        self.name = name
        self._strategies = strategies or {}
        self._change = change

    def strategy(self, retention: float, layers: int) -> Strategy:
        """The strategy that is used at a retention."""
        return self._change(self._strategies.get(retention) or untuned(retention, layers))

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        strategies = [self.strategy(retention, runtime.layers) for retention in retentions]
        return [Compressed(compress(sight.encoded, each, runtime.layers), each) for each in strategies]


class LeanRows(VFlowOpt):
    """VFlowOpt without recycling that drops the row end of a row none of whose tokens is kept, in each stage.

    The places so freed go to the next important tokens: one whose row has no other token takes two, its own and its
    row end's. It stands beside ``vflowopt-no-recycling``, which keeps all row ends.
    """

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        return [
            _without_empty_rows(sight.encoded, replace(self.strategy(each, runtime.layers), grid=None), runtime.layers)
            for each in retentions
        ]


def untuned(retention: float, layers: int) -> Strategy:
    """The published strategy for a budget; for others the next one above it, with its first ratio scaled down."""
    if retention == 1.0:
        return Strategy.full()
    if retention in PUBLISHED:
        return Strategy.preset(retention, layers)
    nearest = min((budget for budget in PUBLISHED if budget > retention), default=max(PUBLISHED))
    preset = PUBLISHED[nearest]
    first, *rest = preset.ratios[:-1]
    leading = (min(1.0, first * retention / nearest), *rest)
    return Strategy.from_budget(
        retention, layers, leading, threshold=preset.threshold, alpha=preset.alpha, grid=preset.grid
    )


def ablations(layers: int) -> list[Method]:
    """VFlowOpt with one part left out, or put in where the published strategies have none.

    The published weight of the entropy is 0: so it is added, not left out.
    """
    return [
        VFlowOpt("vflowopt-no-focus-set", change=lambda each: replace(each, threshold=0.0)),
        VFlowOpt("vflowopt-with-entropy", change=lambda each: replace(each, alpha=0.1)),
        VFlowOpt("vflowopt-no-recycling", change=lambda each: replace(each, grid=None)),
        VFlowOpt("vflowopt-published-reserve", change=lambda each: replace(each, reserve="published")),
        VFlowOpt("vflowopt-single-stage", change=lambda each: _single_stage(each, layers)),
        VFlowOpt("vflowopt-renumbered", change=lambda each: replace(each, positions="renumbered")),
        LeanRows("vflowopt-lean-rows"),
    ]


def curves(layers: int) -> list[Method]:
    """VFlowOpt with one hyperparameter moved through its range, the others as published; the name says which."""
    methods: list[Method] = []
    for threshold in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 50.0):
        methods.append(_moved("threshold", threshold, lambda each, to: replace(each, threshold=to)))
    for alpha in (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0):
        methods.append(_moved("alpha", alpha, lambda each, to: replace(each, alpha=to)))
    for side in (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 24.0):
        methods.append(_moved("grid", side, lambda each, to: replace(each, grid=to)))
    for share in (1.0, 1.2, 1.5, 2.0):
        methods.append(_moved("first-stage", share, lambda each, to: _front_loaded(each, to, layers)))
    return methods


def _moved(parameter: str, value: float, move: Callable[[Strategy, float], Strategy]) -> Method:
    return VFlowOpt(f"vflowopt-{parameter}-{value:g}", change=lambda each: move(each, value))


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


def _without_empty_rows(encoded: EncodedImage, strategy: Strategy, layers: int) -> Compressed:
    layout, scores = encoded.layout, score(encoded, strategy)
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
            positions=kept[0],
            span=len(layout),
            timings=CompressionTimings(encoded.encode_ms, 0.0, 0.0),
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
