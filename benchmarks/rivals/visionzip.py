"""Dominant tokens and merged contextual ones (VisionZip, arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rivals.fastervlm import attention_received
from benchmarks.rivals.method import Compressed, Method, Sight, content_kept, keep_best, single_stage
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.runtime.model_runner import Runtime

CONTEXTUAL = 10 / 64
"""Share of contextual tokens: 54 dominant and 10 contextual of 64 in the paper."""


class VisionZip(Method):
    """Keep the tokens that receive most attention, and merge all others into a few.

    VisionZip (arXiv 2412.04467): of the tokens that are not dominant, some are taken at even distances; every other
    one joins the one of these whose key in the encoder's scoring layer is most similar, and each group is averaged.
    A merged token stands where its target stood.

    Here tokens are merged after the projector, not before it, and over the whole picture, not tile by tile.
    """

    name = "visionzip"

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        encoded = sight.encoded
        attention, keys = attention_received(encoded), _token_keys(encoded)
        return [self._zip(encoded, attention, keys, retention, runtime.layers) for retention in retentions]

    def _zip(self, encoded: EncodedImage, attention: Tensor, keys: Tensor, retention: float, layers: int) -> Compressed:
        content = (~encoded.layout.structural).nonzero().squeeze(-1)
        count = content_kept(encoded, retention, layers)
        contextual = 0 if count >= len(content) else int(CONTEXTUAL * count)
        ranked = content[attention[content].argsort(descending=True, stable=True)]
        dominant, others = ranked[: count - contextual], ranked[count - contextual :].sort().values
        scores = torch.zeros(len(encoded.layout))
        scores[dominant] = 2.0
        if not contextual:
            return keep_best(encoded, scores, single_stage(retention), layers)
        targets = others[torch.arange(contextual) * len(others) // contextual]
        scores[targets] = 1.0
        merged = encoded.embeddings.clone()
        group = (keys[others] @ keys[targets].T).argmax(-1)
        group[torch.searchsorted(others, targets)] = torch.arange(contextual)  # a target stays in its own group
        sums = torch.zeros(contextual, merged.shape[1]).index_add_(0, group, merged[others].float().cpu())
        means = sums / torch.bincount(group, minlength=contextual)[:, None]
        merged[targets] = means.to(merged)
        return keep_best(replace(encoded, embeddings=merged), scores, single_stage(retention), layers)


def _token_keys(encoded: EncodedImage) -> Tensor:
    """Each token's key in the scoring layer, averaged over heads, of unit length: float32 [N, head_dim]."""
    channels = encoded.key.float().mean(1).unbind(-1)
    keys = torch.stack([encoded.arrange(channel.contiguous()).cpu() for channel in channels], dim=-1)
    # What arranging leaves at structural tokens is not specified; nobody reads it.
    return F.normalize(keys, dim=-1)
