"""Attention of the decoder over the paged cache: registered with Hugging Face, called by its own layers.

The decoder's layers stay Hugging Face's; they look attention up by name and pass keyword arguments through. So a
forward pass over a ragged batch hands them the flat tokens of all conversations as *one* row, and the registered
function writes the new keys and values into the caches and attends, conversation by conversation, to what each holds.

Where everything lies is worked out once for all layers of a stage, in an :class:`AttentionPlan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from vflowopt.cache import PagePool, StagedCache

PAGED = "vflow_paged"


class AttentionPlan:
    """Where the tokens of a flat batch are written and read, for a run of layers within which no cache changes stage.

    Args:
        pool: the caches' pages.
        layers: the run of layers.
        caches: the conversations of the batch, in order, with room reserved; those that bring a single token first.
        counts: how many tokens each brings to these layers.
    """

    def __init__(self, pool: PagePool, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]) -> None:
        self.pool = pool
        self.first_layer = layers.start
        tables = [cache.stages[cache.stage_of_layer[layers.start]] for cache in caches]
        rows = [table.slots[layers.start - table.layers.start : layers.stop - table.layers.start] for table in tables]
        held = [table.length + count for table, count in zip(tables, counts, strict=True)]
        device = pool.keys.device
        self.write_slots = torch.cat(
            [row[:, end - count : end] for row, end, count in zip(rows, held, counts, strict=True)], dim=1
        )
        """int64 [layers, tokens]."""

        # Conversations that bring one token are attended to together, padded to the longest of them.
        self.singles = next((place for place, count in enumerate(counts) if count != 1), len(counts))
        longest = max(held[: self.singles], default=0)
        self.single_slots = torch.empty(len(layers), self.singles, longest, dtype=torch.int64, device=device)
        """int64 [layers, singles, longest]; what pads a conversation is its own last slot: whatever is wrong with the
        numbers of another (NaN times a weight of zero is NaN), it stays there."""
        for place in range(self.singles):
            self.single_slots[:, place, : held[place]] = rows[place][:, : held[place]]
            self.single_slots[:, place, held[place] :] = rows[place][:, held[place] - 1 : held[place]]
        lengths = torch.tensor(held[: self.singles], device=device)
        seen = (torch.arange(longest, device=device) < lengths[:, None])[:, None, None]
        self.single_mask: Tensor | None = None if self.singles == 1 else seen
        """bool [singles, 1, 1, longest]; None where nothing is padded."""

        self.chunks: list[tuple[slice, Tensor | None, Tensor | None]] = []
        """Of each other conversation: its tokens in the batch; the slots [layers, held] of all it holds with them, and
        which of these each token sees; None and None where its own tokens are all it holds."""
        start = self.singles
        for row, end, count in list(zip(rows, held, counts, strict=True))[self.singles :]:
            tokens = slice(start, start + count)
            start += count
            if not count:
                continue  # a chunk of a picture none of whose tokens has come this far
            if count == end:
                self.chunks.append((tokens, None, None))
            else:
                mask = torch.ones(count, end, dtype=torch.bool, device=device).tril(end - count)
                self.chunks.append((tokens, row[:, :end], mask))


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each conversation's new tokens over everything it holds in this layer.

    Args:
        module: the attention module of a decoder layer; its ``layer_idx`` says which.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim].
        value: [1, kv_heads, tokens, head_dim].
        attention_mask: always None; what may be seen follows from the plan.
        plan: where the tokens are written and read.
        scaling: factor of the scores.

    Returns:
        [1, tokens, heads, head_dim], and None for the weights, which are never materialised.
    """
    layer = cast(int, module.layer_idx) - plan.first_layer
    keys, values = plan.pool.keys, plan.pool.values
    keys.index_copy_(0, plan.write_slots[layer], key[0].transpose(0, 1))
    values.index_copy_(0, plan.write_slots[layer], value[0].transpose(0, 1))

    def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )

    outputs = []
    if plan.singles:
        slots = plan.single_slots[layer]
        # The query heads that share a key head stand in for query tokens: one pass over the keys serves them all.
        shape = (plan.singles, key.shape[1], -1, query.shape[-1])
        together = attend(
            query[0, :, : plan.singles].transpose(0, 1).reshape(shape),
            keys.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2),
            values.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2),
            plan.single_mask,
        )
        outputs.append(together.reshape(plan.singles, query.shape[1], query.shape[-1]))
    for tokens, slots_of_all, mask in plan.chunks:
        if slots_of_all is None:
            # What was just computed is everything: no need to gather it again.
            chunk = attend(query[:, :, tokens], key[:, :, tokens], value[:, :, tokens], None, causal=True)
        else:
            slots = slots_of_all[layer]
            chunk = attend(
                query[:, :, tokens],
                keys.index_select(0, slots).transpose(0, 1)[None],
                values.index_select(0, slots).transpose(0, 1)[None],
                mask,
            )
        outputs.append(chunk[0].transpose(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register(PAGED, paged_attention)
