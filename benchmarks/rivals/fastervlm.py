"""Attention received in the vision encoder (FasterVLM, arXiv 2412.01818)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rivals.method import ScoringMethod, Sight
from vflowopt.compression.importance import received_attention
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.runtime.model_runner import Runtime


class FasterVlm(ScoringMethod):
    """Keep the tokens that receive most attention in the encoder's scoring layer.

    FasterVLM (arXiv 2412.01818) ranks by the attention of the class token. Where the encoder has none (SigLIP), or the
    model does not score by it, the mean over all queries takes its place.
    """

    name = "fastervlm"

    def scores(self, runtime: Runtime, sight: Sight, most: int) -> Tensor:
        """See :meth:`ScoringMethod.scores`."""
        return attention_received(sight.encoded)


def attention_received(encoded: EncodedImage) -> Tensor:
    """Mean attention that each token receives within its tile, float32 [N]; zero at structural tokens."""
    maps = torch.stack([received_attention(attention) for attention in encoded.attention()])
    arranged = encoded.arrange(maps.float()).cpu()
    return arranged.masked_fill(encoded.layout.structural, 0.0)
