"""Importance and diversity by maximal marginal relevance (IDPruner, arXiv 2602.13315)."""

from __future__ import annotations

from torch import Tensor

from benchmarks.rivals.fastervlm import attention_received
from benchmarks.rivals.method import ScoringMethod, Sight
from vflowopt.compression.diversity import diversified
from vflowopt.runtime.model_runner import Runtime


class IdPruner(ScoringMethod):
    """Add the token that is important and unlike those chosen already.

    IDPruner (arXiv 2602.13315) re-ranks by maximal marginal relevance: ``balance`` times the importance, scaled to
    [0, 1], less ``1 - balance`` times the greatest cosine similarity to a chosen token. The paper's importance comes
    from a selector that is trained for the model; none exists for arbitrary models, so attention received takes its
    place. The rest, the trade-off that the paper is about, is as published.

    Args:
        balance: weight of importance against diversity, 0 or more and below 1; the paper's is 0.5.
    """

    name = "idpruner"

    def __init__(self, balance: float = 0.5) -> None:
        self.balance = balance

    def scores(self, runtime: Runtime, sight: Sight, most: int) -> Tensor:
        """See :meth:`ScoringMethod.scores`."""
        encoded = sight.encoded
        importance = attention_received(encoded)
        return diversified(importance, encoded.entering, encoded.layout.structural, most, 1.0 - self.balance)
