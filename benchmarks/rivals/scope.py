"""Saliency times coverage (SCOPE, arXiv 2510.24214)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rivals.fastervlm import attention_received
from benchmarks.rivals.greedy import content_similarity, scores_of_order
from benchmarks.rivals.method import ScoringMethod, Sight
from vflowopt.runtime.model_runner import Runtime


class Scope(ScoringMethod):
    """Add the token that covers most of what is not covered yet, times its saliency.

    SCOPE (arXiv 2510.24214): a token is covered as far as the chosen token most similar to it, by cosine of projected
    tokens. A candidate's gain is the sum of what it would add to the coverage of all tokens; its score is gain times
    saliency to the power of ``exponent``. Saliency is the attention received in the vision encoder.

    Args:
        exponent: weight of saliency against coverage; 0 is coverage alone.
    """

    name = "scope"

    def __init__(self, exponent: float = 1.0) -> None:
        self.exponent = exponent

    def scores(self, runtime: Runtime, sight: Sight, most: int) -> Tensor:
        """See :meth:`ScoringMethod.scores`."""
        similarity, content = content_similarity(sight.encoded)
        saliency = attention_received(sight.encoded)[content] ** self.exponent
        covered = torch.zeros(len(content))
        order: list[int] = []
        for _ in range(most):
            score = (similarity - covered).clamp_min_(0.0).sum(-1).mul_(saliency)
            score[order] = -torch.inf
            order.append(int(score.argmax()))
            covered = torch.maximum(covered, similarity[order[-1]])
        return scores_of_order(content[order], len(sight.encoded.layout))
