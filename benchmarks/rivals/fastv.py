"""Attention of the last token in the second layer (FastV, arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from benchmarks.rivals.method import Compressed, Method, Sight, keep_best, single_stage
from benchmarks.rivals.prompt_pass import PromptPass
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime

FILTER_LAYER = 2
"""Layers that run on all tokens, K in the paper."""


class FastV(Method):
    """Keep what the prompt's last token attends to in the second layer.

    FastV (arXiv 2403.06764) runs the first two layers on all visual tokens and drops those that got least attention
    there from all later layers. In a shallow decoder two full layers alone exceed a small budget; there the tokens so
    chosen are the only ones from the first layer on, and the look at all of them is not charged.
    """

    name = "fastv"
    question_aware: ClassVar[bool] = True

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        look = PromptPass(runtime, sight.encoded, sight.question)
        voters = self.voters(look)
        look.run(range(min(FILTER_LAYER, runtime.layers)))
        scores = look.attention(voters)
        return [
            keep_best(sight.encoded, scores, filter_strategy(retention, runtime.layers), runtime.layers)
            for retention in retentions
        ]

    def voters(self, look: PromptPass) -> Tensor | None:
        """Which tokens of the text behind the picture vote, told before any layer has run; None: the last one."""
        return None


def filter_strategy(retention: float, layers: int) -> Strategy:
    """All tokens in the first two layers and as many as the budget leaves after them; one stage where it leaves none.

    A budget that leaves less than a hundredth of the tokens to the later layers counts as one that leaves none.
    """
    deep = layers - FILTER_LAYER
    if retention == 1.0 or deep < 1 or retention * layers - FILTER_LAYER < 0.01 * deep:
        return single_stage(retention)
    return Strategy.from_budget(retention, layers, (1.0,), starts=(0, FILTER_LAYER))
