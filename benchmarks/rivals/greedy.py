"""What the methods that add one token at a time have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vflowopt.compression.pipeline import EncodedImage


def content_similarity(encoded: EncodedImage) -> tuple[Tensor, Tensor]:
    """Cosine similarity of the projected tokens with pixels, as the first decoder layer gets them.

    Returns:
        float32 [n, n], and the indices int64 [n] of these tokens among all N.
    """
    content = (~encoded.layout.structural).nonzero().squeeze(-1)
    features = F.normalize(encoded.entering.float().cpu()[content], dim=-1)
    return features @ features.T, content


def scores_of_order(order: Tensor, tokens: int) -> Tensor:
    """Scores, float32 [tokens], that rank the tokens as ``order``, int64 [most], adds them; all others come last."""
    scores = torch.zeros(tokens)
    scores[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
    return scores
