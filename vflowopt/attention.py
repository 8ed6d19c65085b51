"""Attention of the decoder over the paged cache: registered with Hugging Face, called by its own layers.

The decoder's layers stay Hugging Face's; they look attention up by name and pass keyword arguments through. So a
forward pass over a ragged batch hands them the flat tokens of all conversations as *one* row, and the registered
function cuts that row into its segments, writes new keys and values into each conversation's cache and attends to
what that cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from vflowopt.cache import StagedCache

PAGED = "vflow_paged"


@dataclass(frozen=True)
class Span:
    """The tokens that one conversation has in a layer's flat batch.

    Attributes:
        cache: the conversation's cache, with room reserved for them.
        start: their first place in the batch.
        stop: one past their last place.
    """

    cache: StagedCache
    start: int
    stop: int


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: list[Span],
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each span over everything its conversation holds in this layer.

    Args:
        module: the attention module of a decoder layer; its ``layer_idx`` says which.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim].
        value: [1, kv_heads, tokens, head_dim].
        attention_mask: always None; what may be seen follows from the spans.
        spans: the conversations of the batch; together they cover all its tokens.
        scaling: factor of the scores.

    Returns:
        [1, tokens, heads, head_dim], and None for the weights, which are never materialised.
    """
    layer = cast(int, module.layer_idx)
    grouped = query.shape[1] != key.shape[1]
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    outputs = []
    for span in spans:
        stage = span.cache.stages[span.cache.stage_of_layer[layer]]
        tokens = span.stop - span.start
        held = stage.length + tokens
        stage.write(layer, new_keys[span.start : span.stop], new_values[span.start : span.stop], stage.length)
        if stage.length == 0:
            # Nothing cached: what was just computed is everything, no need to gather it again.
            keys, values = new_keys[span.start : span.stop], new_values[span.start : span.stop]
        else:
            keys, values = stage.read(layer, held)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                query[:, :, span.start : span.stop],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=_lower_right(tokens, held, query.device),
                is_causal=tokens > 1 and tokens == held,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _lower_right(tokens: int, held: int, device: torch.device) -> Tensor | None:
    """Which of ``held`` keys each of the last ``tokens`` queries sees, bool [tokens, held]; None: no mask is needed."""
    if tokens == 1 or tokens == held:
        return None
    return torch.ones(tokens, held, dtype=torch.bool, device=device).tril(held - tokens)


AttentionInterface.register(PAGED, paged_attention)
