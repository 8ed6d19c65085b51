"""Text-aware dropping in stages (PyramidDrop, arXiv 2410.17247)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.rivals.method import Compressed, Method, Sight, keep_best
from benchmarks.rivals.prompt_pass import PromptPass
from vflowopt.compression.pruning import stage_targets
from vflowopt.compression.strategy import Strategy, thirds
from vflowopt.runtime.model_runner import Runtime

STAGES = 4
RATIO = 0.5
"""Of the tokens of a stage, those that go on into the next one."""


class PyramidDrop(Method):
    """Drop, at the end of each of four stages, the tokens that the prompt's last token attends to least.

    PyramidDrop (arXiv 2410.17247) keeps all tokens in the first stage and half of them from stage to stage, 47% on
    average. To meet other budgets: above that, a larger share goes on; below it, the first stage, too, keeps only the
    best by the attention at its own end, where a look at all tokens ranks them, which is not charged. A decoder of
    fewer than four layers has as many stages as layers.

    Args:
        look: drops before the end of this layer go by the attention in it, from a look at all tokens that is not
            charged. In a shallow decoder the first stages end too early to tell. With 0 all stages rank for themselves,
            as published.
        name: its name in tables.
    """

    question_aware: ClassVar[bool] = True

    def __init__(self, look: int = 0, name: str = "pyramiddrop") -> None:
        self.name = name
        self._look = look

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        strategies = [pyramid(retention, runtime.layers) for retention in retentions]
        looked = min(max(self._look, *strategies[0].starts[1:2]), runtime.layers)
        whole = PromptPass(runtime, sight.encoded, sight.question)
        whole.run(range(looked))
        first_look = whole.attention()
        return [self._drop(runtime, sight, each, first_look, looked) for each in strategies]

    def _drop(self, runtime: Runtime, sight: Sight, strategy: Strategy, first_look: Tensor, looked: int) -> Compressed:
        structural = sight.encoded.layout.structural
        tokens, layers = len(structural), runtime.layers
        targets = stage_targets(strategy, tokens, int(structural.sum()), layers)
        # How many stages a token survives; structural ones survive all.
        survived = torch.zeros(tokens).masked_fill(structural, float(len(targets)))
        survivors = torch.arange(tokens)
        prompt = PromptPass(runtime, sight.encoded, sight.question)
        ends = (*strategy.starts[1:], layers)
        attention = first_look
        for start, end, target in zip(strategy.starts, ends, targets, strict=True):
            if target < len(survivors):
                ranks = attention.masked_fill(structural[survivors], torch.inf)
                survivors = survivors[ranks.argsort(descending=True, stable=True)[:target]].sort().values
                prompt.keep(survivors)
            survived[survivors] += 1.0
            if end < layers:
                prompt.run(range(start, end))
                attention = prompt.attention() if end >= looked else first_look[survivors]
        return keep_best(sight.encoded, survived, strategy, layers)


def pyramid(retention: float, layers: int) -> Strategy:
    """Stages whose layer-average is ``retention``: see :class:`PyramidDrop`."""
    starts = thirds(layers, min(STAGES, layers))

    def shaped(first: float, ratio: float) -> Strategy:
        return Strategy(starts, (first, *[ratio] * (len(starts) - 1)))

    published = shaped(1.0, RATIO).budget(layers)
    if retention <= published:
        return shaped(retention / published, RATIO)
    low, high = RATIO, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if shaped(1.0, middle).budget(layers) < retention else (low, middle)
    return shaped(1.0, high)
