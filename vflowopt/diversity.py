"""Diversity: an order of the tokens in which none comes early that is like one before it.

Not part of VFlowOpt as published. Importance alone keeps many tokens of the same bright patch; at a tenth of the tokens
that costs more answers than the choice between importance measures does (``benchmarks/fidelity.py``). The trade-off is
maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998; for visual tokens IDPruner, arXiv 2602.13315), with
VFlowOpt's importance as the relevance. Like the importance it knows no question, so what is kept serves every turn.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
    device = features.device
    content = (~structural).nonzero().squeeze(-1)
    relevance = importance[content].float().to(device)
    spread = (relevance.max() - relevance.min()).clamp_min(torch.finfo(relevance.dtype).tiny)
    relevance = (relevance - relevance.min()) / spread
    directions = F.normalize(features[content.to(device)].float(), dim=-1)
    # Similarities of one token at a time, and no look at which it is: a matrix of all of them would take more than the
    # order needs, and a device is not waited for.
    score = relevance.clone()
    likeness = torch.full_like(relevance, -torch.inf)
    order = torch.empty(min(count, len(content)), dtype=torch.int64, device=device)
    for place in range(len(order)):
        token = score.argmax(keepdim=True)
        order[place : place + 1] = token
        likeness = torch.maximum(likeness, directions @ directions[token].squeeze(0))
        likeness[token] = torch.inf  # never again
        score = (1.0 - weight) * relevance - weight * likeness
    ahead = order.cpu()
    left = torch.ones(len(content), dtype=torch.bool)
    left[ahead] = False
    behind = left.nonzero().squeeze(-1)
    behind = behind[importance[content[behind]].argsort(descending=True, stable=True)]
    ranks = torch.zeros(len(structural))
    ranks[content[torch.cat((ahead, behind))]] = torch.arange(len(content), 0, -1, dtype=torch.float32)
    return ranks
