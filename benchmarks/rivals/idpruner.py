"""Importance and diversity by maximal marginal relevance (IDPruner, arXiv 2602.13315)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rivals.fastervlm import attention_received
from benchmarks.rivals.greedy import content_similarity, scores_of_order
from benchmarks.rivals.method import ScoringMethod, Sight
from vflowopt.runtime import Runtime


class IdPruner(ScoringMethod):
    """Add the token that is important and unlike those chosen already.

    IDPruner (arXiv 2602.13315) re-ranks by maximal marginal relevance: ``balance`` times the importance, scaled to
    [0, 1], less ``1 - balance`` times the greatest cosine similarity to a chosen token. The paper's importance comes
    from a selector that is trained for the model; none exists for arbitrary models, so attention received takes its
    place. The rest, the trade-off that the paper is about, is as published.

    Args:
        balance: weight of importance against diversity; the paper's is 0.5.
    """

    name = "idpruner"

    def __init__(self, balance: float = 0.5) -> None:
        self.balance = balance

    def scores(self, runtime: Runtime, sight: Sight, most: int) -> Tensor:
        """See :meth:`ScoringMethod.scores`."""
        similarity, content = content_similarity(sight.encoded)
        importance = attention_received(sight.encoded)[content]
        spread = (importance.max() - importance.min()).clamp_min(torch.finfo(importance.dtype).tiny)
        relevance = self.balance * (importance - importance.min()) / spread
        order = [int(relevance.argmax())]
        likeness = similarity[order[0]]
        while len(order) < most:
            score = relevance - (1.0 - self.balance) * likeness
            score[order] = -torch.inf
            order.append(int(score.argmax()))
            likeness = torch.maximum(likeness, similarity[order[-1]])
        return scores_of_order(content[order], len(sight.encoded.layout))
