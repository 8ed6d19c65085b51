"""Attention of the last token in an early layer (FastV, arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from benchmarks.rivals.method import Compressed, Method, Sight, keep_best, single_stage
from benchmarks.rivals.prompt_pass import PromptPass
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime

PUBLISHED_LOOK = 2
"""Layers that run on all tokens, K in the paper."""


class FastV(Method):
    """Keep what the prompt's last token attends to in an early layer.

    FastV (arXiv 2403.06764) runs its first layers on all visual tokens and drops those that got least attention there
    from all later layers. In a shallow decoder these layers alone exceed a small budget. There the chosen tokens are
    the only ones from the first layer on, and the look at all of them is not charged.

    Args:
        look: how many layers run on all tokens before the choice; the last of them is looked at. The paper's 2 suits a
            decoder of 32 layers.
        name: its name in tables.
    """

    question_aware: ClassVar[bool] = True

    def __init__(self, look: int = PUBLISHED_LOOK, name: str = "fastv") -> None:
        self.name = name
        self._look = look

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        look = PromptPass(runtime, sight.encoded, sight.question)
        voters = self.voters(look)
        layer = min(self._look, runtime.layers)
        look.run(range(layer))
        scores = look.attention(voters)
        return [
            keep_best(sight.encoded, scores, filter_strategy(retention, runtime.layers, layer), runtime.layers)
            for retention in retentions
        ]

    def voters(self, look: PromptPass) -> Tensor | None:
        """Which tokens of the text behind the picture vote, decided before any layer has run; None: the last one."""
        return None


def filter_strategy(retention: float, layers: int, look: int) -> Strategy:
    """All tokens in the first ``look`` layers, then as many as the budget leaves; one stage where it leaves none.

    A budget that leaves less than a hundredth of the tokens to the later layers counts as one that leaves none.
    """
    deep = layers - look
    if retention == 1.0 or deep < 1 or retention * layers - look < 0.01 * deep:
        return single_stage(retention)
    return Strategy.from_budget(retention, layers, (1.0,), starts=(0, look))
