"""Importance of visual tokens: context relevance plus patch entropy (VFlowOpt, arXiv 2508.05211; method section 1).

One map is the tokens of one tile or frame, as the vision encoder saw it. Importance needs no text. Every function here
also takes several maps at once, as leading dimensions; each map is then scored by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GREY_LEVELS = 256

_MOST_WEIGHTS = 1 << 26
"""Attention weights of a map in memory at a time: a picture of 12 megapixels that is one map has 4 billion."""


def head_averaged_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention weights of one layer, averaged over its heads.

    The heads are added up one at a time, so that heads x N x N weights are never in memory.

    Args:
        query: [..., heads, Q, head_dim].
        key: [..., heads, N, head_dim].
        scale: factor of the scores before the softmax.

    Returns:
        float32 (float64 for float64 input) [..., Q, N]; rows are queries and sum to 1.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads = query.shape[-3]
    if heads == 0 or query.shape[:-2] != key.shape[:-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must be [..., heads, Q, head_dim] and [..., heads, N, head_dim] with at least one head, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    total: Tensor | None = None
    for head_query, head_key in zip(query.unbind(-3), key.unbind(-3), strict=True):
        scores = (head_query.to(dtype) * scale) @ head_key.to(dtype).transpose(-1, -2)
        weights = scores.softmax(-1)
        total = weights if total is None else total.add_(weights)
    assert total is not None  # there is at least one head
    return total.div_(heads)


def received_attention(attention: Tensor) -> Tensor:
    """Average the attention that each token receives from all tokens: r[k] = mean over q of A[q, k].

    Args:
        attention: [..., N, N] head-averaged weights, rows are queries.

    Returns:
        [..., N].
    """
    return attention.mean(-2)


def context_relevance(attention: Tensor, threshold: float) -> Tensor:
    """Average the attention that each token receives from the focus set: c[k] = mean over q in K of A[q, k].

    The focus set K holds the tokens that receive more than ``threshold`` times the mean attention. Redundant background
    tokens attend to each other; so only tokens that receive much attention get a vote. Where no token does, K is all
    tokens. The mean, not the paper's sum: the size of K then does not rescale alpha.

    Args:
        attention: [..., N, N] head-averaged weights, rows are queries.
        threshold: sensitivity t, at least 0.

    Returns:
        [..., N].
    """
    received = received_attention(attention)
    focus = received > threshold * received.mean(-1, keepdim=True)
    votes = (focus | ~focus.any(-1, keepdim=True)).to(attention.dtype)
    return (votes.unsqueeze(-2) @ attention).squeeze(-2) / votes.sum(-1, keepdim=True)


def context_relevance_of(query: Tensor, key: Tensor, scale: float, threshold: float, patches: int) -> Tensor:
    """:func:`context_relevance` of one map, with only a block of rows of its attention in memory at a time.

    Args:
        query: [heads, patches, head_dim], of one map; or [heads, 1, head_dim], whose attention then is the answer.
        key: [heads, N, head_dim].
        scale: factor of the scores before the softmax.
        threshold: sensitivity t, at least 0.
        patches: how many keys, the last ones, carry pixels; what others receive is left out.

    Returns:
        float32 [patches].
    """

    def attention(queries: Tensor) -> Tensor:
        return head_averaged_attention(queries, key, scale)[:, -patches:]

    if query.shape[-2] == 1:
        return attention(query)[0]
    rows = max(1, _MOST_WEIGHTS // key.shape[-2])
    if query.shape[-2] <= rows:
        return context_relevance(attention(query), threshold)
    received = torch.stack([attention(block).sum(0) for block in query.split(rows, dim=-2)]).sum(0)
    focus = received > threshold * received.mean()
    if not focus.any():
        return received / query.shape[-2]
    votes = query[:, focus].split(rows, dim=-2)
    return torch.stack([attention(block).sum(0) for block in votes]).sum(0) / focus.sum()


def patch_entropy(pixels: Tensor, patch: int) -> Tensor:
    """Shannon entropy of the grey levels of each patch, H in the paper.

    Args:
        pixels: uint8 [..., height, width, 3], the 8-bit image that the encoder saw: after resize and pad, before
            normalisation.
        patch: side of a patch in pixels. What lies beyond the last whole patch is left out, as the encoder does.

    Returns:
        float32 [..., height // patch, width // patch], in bits: 0 for a flat patch, at most 8.

    Raises:
        ValueError: pixels are not uint8 [..., height, width, 3], or no patch fits.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() < 3 or pixels.shape[-1] != 3:
        # Normalised floats cast to bytes wrap around: the released code's fault, refused here.
        raise ValueError(f"pixels must be uint8 [..., height, width, 3], got {pixels.dtype} {tuple(pixels.shape)}")
    rows, columns = (size // patch for size in pixels.shape[-3:-1]) if patch > 0 else (0, 0)
    if rows == 0 or columns == 0:
        raise ValueError(f"no patch of side {patch} fits into pixels of shape {tuple(pixels.shape)}")
    # The mean of three integers is never halfway between two: adding 1 before the division rounds it.
    grey = (pixels[..., : rows * patch, : columns * patch, :].sum(-1, dtype=torch.int64) + 1) // 3
    maps = grey.shape[:-2]
    levels = grey.reshape(-1, rows, patch, columns, patch).transpose(2, 3).reshape(-1, patch * patch)
    bins = levels + GREY_LEVELS * torch.arange(len(levels), device=pixels.device).unsqueeze(-1)
    counts = bins.flatten().bincount(minlength=GREY_LEVELS * len(levels)).reshape(len(levels), GREY_LEVELS)
    shares = counts.to(torch.float32) / (patch * patch)
    entropy: Tensor = torch.special.entr(shares).sum(-1) / math.log(2)
    return entropy.reshape(*maps, rows, columns)


def importance(context: Tensor, entropy: Tensor, alpha: float) -> Tensor:
    """Add context relevance and patch entropy: I = c + alpha * softmax(H).

    Args:
        context: [..., N].
        entropy: [..., N] in bits; the softmax runs over the tokens of a map.
        alpha: weight of the entropy, in [-1, 1]. Below zero, importance may be negative.

    Returns:
        [..., N].
    """
    return context + alpha * entropy.to(context.dtype).softmax(-1)
