"""Diversity: an order of the tokens that puts a token later if it is similar to an earlier one.

Not part of VFlowOpt as published. Importance alone keeps many tokens of the same bright patch; at a tenth of the tokens
that costs more answers than the choice between importance measures does (``benchmarks/fidelity.py``). The trade-off is
maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998; for visual tokens IDPruner, arXiv 2602.13315), with
VFlowOpt's importance as the relevance. Like the importance it knows no question, so what is kept serves every turn.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vflowopt.compression.pieces import Pieces, whole
from vflowopt.kernels.diversity_kernel import diversity_kernel


def diversified(importance: Tensor, features: Tensor, structural: Tensor, count: int, weight: float) -> Tensor:
    """Rank the tokens by maximal marginal relevance.

    The most important token comes first. Then, one after the other, comes the token with the greatest
    ``(1 - weight) * importance - weight * likeness``, where importance is scaled to [0, 1] and likeness is the greatest
    cosine similarity to a token that came before. Any beginning of the order is thus a choice by the same measure, for
    each stage of a strategy.

    Args:
        importance: [N]; its values at structural tokens do not matter.
        features: [N, dim], the projected tokens.
        structural: bool [N]; these are not ranked.
        count: how many of the other tokens to rank so; those after them follow by importance.
        weight: of diversity against importance, above 0 and up to 1.

    Returns:
        float32 [N], on the processor, greater for tokens that come earlier; zero at structural tokens.
    """
    return whole(diversifying(importance, features, structural, count, weight))


def diversifying(importance: Tensor, features: Tensor, structural: Tensor, count: int, weight: float) -> Pieces[Tensor]:
    """:func:`diversified` in pieces."""
    device = features.device
    content = (~structural).nonzero().squeeze(-1)
    values = importance[content].float()
    relevance = values.to(device)
    count = min(count, len(content))
    order: list[int] = []
    if count:
        spread = (relevance.max() - relevance.min()).clamp_min(torch.finfo(relevance.dtype).tiny)
        relevance = (1.0 - weight) * (relevance - relevance.min()) / spread
        directions = features[content.to(device)].float()
        directions /= directions.norm(dim=-1, keepdim=True).clamp_min(_TINY)  # in place: rows may take 100 megabytes
        kernel = diversity_kernel() if device.type == "cpu" else None
        in_order = _in_order if kernel is None else kernel.order
        order = yield from in_order(directions, relevance, int(values.argmax()), count, weight)
    behind = torch.ones(len(content), dtype=torch.bool)
    behind[order] = False
    rest = behind.nonzero().squeeze(-1)
    rest = rest[importance[content[rest]].argsort(descending=True, stable=True)]
    ranks = torch.zeros(len(structural))
    places = torch.cat((torch.tensor(order, dtype=torch.int64), rest))
    ranks[content[places]] = torch.arange(len(content), 0, -1, dtype=torch.float32)
    return ranks


def _in_order(directions: Tensor, relevance: Tensor, first: int, count: int, weight: float) -> Pieces[list[int]]:
    """The same as :meth:`DiversityKernel.order`, on any device and without a compiler."""
    # Products are summed in float64 and rounded, so that the order does not depend on the order of summation. GPUs are
    # slow in float64; there, tokens whose scores differ by rounding errors alone may be swapped.
    exact = directions.double() if directions.device.type == "cpu" else directions
    order: list[int] = []
    picked = [first]
    likeness = torch.full_like(relevance, -torch.inf)
    while True:
        order += picked
        likeness = torch.maximum(likeness, (exact @ exact[picked].T).float().amax(-1))
        likeness[picked] = torch.inf  # and never again
        if len(order) == count:
            return order
        yield
        picked = _next(relevance, likeness, exact, weight, count - len(order))


def _next(relevance: Tensor, likeness: Tensor, directions: Tensor, weight: float, most: int) -> list[int]:
    """The next tokens in order: as many as the scores of the best few tokens decide, and ``most`` at most.

    The score of a token only falls as other tokens come before it. So the first of the best few is the next of all
    tokens as long as its score is above the present scores of all others. Several tokens are chosen this way, and then
    the others are compared with all of them in one product.
    """
    scores = relevance - weight * likeness
    best = scores.argsort(descending=True, stable=True)[: _FEW + 1]
    few, others = best[:_FEW].sort().values, scores[best[_FEW:]]
    bound = float(others[0]) if len(others) else -np.inf
    near = directions[few]
    similarity = (near @ near.T).float().cpu().numpy()
    score, worth, like = (each[few].cpu().numpy() for each in (scores, relevance, likeness))
    picked: list[int] = []
    while len(picked) < most:
        leader = int(score.argmax())
        # Of equal tokens the first is the next one. Which that is shows if the others are up to date, as they are now.
        if picked and score[leader] <= bound:
            break
        picked.append(leader)
        like = np.maximum(like, similarity[leader])
        like[leader] = np.inf
        score = worth - weight * like
    chosen: list[int] = few[picked].tolist()
    return chosen


_FEW = 64
"""How many of the best tokens are compared with each other at a time."""

_TINY = 1e-12
"""The least length that features are divided by, so that zeros stay zeros."""
