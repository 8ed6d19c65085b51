"""Pruning in stages: how many visual tokens stay, and which (VFlowOpt, method section 2)."""

from __future__ import annotations

import math
from bisect import bisect_right

from torch import Tensor

from vflowopt.compression.strategy import Strategy

# A ratio that was solved for misses whole numbers by rounding; without this guard 0.25 * 256 could come out at 63.
_DUST = 1e-9


def stage_targets(strategy: Strategy, tokens: int, structural: int, layers: int) -> tuple[int, ...]:
    """Count the tokens, structural ones included, that each stage keeps of a picture.

    Whole numbers that never exceed the budget: sum of targets[s] * L_s <= budget * tokens * L. Each stage's share is
    rounded down; what rounding lost goes back, a token per stage and earliest stage first, as far as the budget allows.
    Structural tokens and one content token always stay; where a stage's share is smaller, the larger stages before it
    give way. Only a budget that cannot even hold these in every layer is exceeded, and then nothing else stays.

    Args:
        strategy: its ratios and stages.
        tokens: N, all visual tokens of the picture.
        structural: how many of them are structural.
        layers: decoder layers L.

    Returns:
        One count per stage, never ascending, each at most ``tokens``.

    Raises:
        StrategyError: a stage starts past the last layer.
        ValueError: there are more structural tokens than tokens.
    """
    if not 0 <= structural <= tokens:
        raise ValueError(f"structural tokens must be among the {tokens} tokens, got {structural}")
    spans = strategy.spans(layers)
    room = math.floor(strategy.budget(layers) * tokens * layers * (1 + _DUST))
    floor = min(structural + 1, tokens)
    targets = [max(math.floor(fraction * tokens * (1 + _DUST)), floor) for fraction in strategy.retention]

    def cost(ceiling: int) -> int:
        return sum(min(target, ceiling) * span for target, span in zip(targets, spans, strict=True))

    ceiling = floor + bisect_right(range(floor + 1, targets[0] + 1), room, key=cost)
    targets = [min(target, ceiling) for target in targets]
    left = room - cost(ceiling)
    for stage, span in enumerate(spans):
        limit = tokens if stage == 0 else targets[stage - 1]
        if span <= left and targets[stage] < limit:
            targets[stage] += 1
            left -= span
    return tuple(targets)


def keep_most_important(importance: Tensor, structural: Tensor, count: int) -> Tensor:
    """Choose which tokens stay: all structural ones, then the most important.

    Equally important tokens are taken in order, so that the choice depends on nothing but the arguments.

    Args:
        importance: [N]; its values at structural tokens do not matter.
        structural: bool [N].
        count: how many stay. Where fewer than the structural tokens are asked for, exactly these stay.

    Returns:
        int64 [min(max(count, structural tokens), N)], ascending indices.
    """
    order = importance.masked_fill(structural, math.inf).argsort(descending=True, stable=True)
    stays = structural.clone()
    stays[order[:count]] = True
    return stays.nonzero().squeeze(-1)
