"""Diversity alone: the greatest least distance (DivPrune, arXiv 2503.02175)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rivals.greedy import content_similarity, scores_of_order
from benchmarks.rivals.method import ScoringMethod, Sight
from vflowopt.runtime.model_runner import Runtime


class DivPrune(ScoringMethod):
    """Keep the subset whose closest two tokens are furthest apart.

    DivPrune (arXiv 2503.02175) states pruning as the max-min diversity problem under the cosine distance of projected
    tokens, and solves it greedily: the first token is the one furthest from its nearest neighbour, every next one the
    one furthest from all chosen so far.
    """

    name = "divprune"

    def scores(self, runtime: Runtime, sight: Sight, most: int) -> Tensor:
        """See :meth:`ScoringMethod.scores`."""
        similarity, content = content_similarity(sight.encoded)
        distance = 1.0 - similarity
        nearest = (distance + torch.diag(torch.full((len(content),), torch.inf))).amin(-1)
        order: list[int] = []
        for _ in range(most):
            chosen = int(nearest.argmax())
            # Of the first, the distance to tokens that were never chosen is forgotten.
            nearest = torch.minimum(nearest, distance[chosen]) if order else distance[chosen].clone()
            order.append(chosen)
            nearest[order] = -torch.inf
        return scores_of_order(content[order], len(sight.encoded.layout))
