"""Attention of the decoder on a CUDA device: PyTorch's variable-length flash attention over the paged cache.

One kernel call serves all sequences of a batch, prefills and decodes alike, whereas
:class:`vflowopt.runtime.attention.AttentionPlan` makes one call for each prefill. The kernel needs half precision. How
it reads the cache depends on the version of flash attention:

- ``"paged"``: in place, through a block table. Flash attention 3 takes pages of any size. The version that PyTorch is
  built with takes only pages of a multiple of 256 tokens, which would waste most of a pruned cache.
- ``"gathered"``: from a copy in which each sequence's pages are contiguous.

:func:`page_access` finds out by trial which of the two works. Versions differ, and a kernel that reads pages in another
order, or applies another mask, would give wrong answers and no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

from vflowopt.runtime.attention import AttentionPlan
from vflowopt.runtime.cache import PagePool, StagedCache

PageAccess = Literal["paged", "gathered"]
"""How the kernel reads the cache."""

_CAUSAL = (-1, 0)
"""The window in which a query attends to all keys up to its own; a sequence's last query attends to its last key."""


class VarlenPlan:
    """Where the tokens of a flat batch are written and read, for a run of layers within which no cache changes stage.

    The same as :class:`vflowopt.runtime.attention.AttentionPlan`, with another kernel. The host does not wait for the
    device: it computes all that the layers need, and copies it from pinned memory.

    Args:
        pool: the caches' pages, of half precision.
        layers: the run of layers.
        caches: the caches of the batch, in order, with pages reserved.
        counts: how many tokens each sequence runs in these layers.
        access: how the kernel reads the cache.
    """

    def __init__(
        self,
        pool: PagePool,
        layers: range,
        caches: Sequence[StagedCache],
        counts: Sequence[int],
        *,
        access: PageAccess,
    ) -> None:
        self.pool = pool
        self.first_layer = layers.start
        device, size = pool.keys.device, pool.page_size
        stages = [cache.stages[cache.stage_of_layer[layers.start]] for cache in caches]
        # A chunk of a picture may have no token in this stage: the kernel is not given its sequence then.
        present = [(stage, count) for stage, count in zip(stages, counts, strict=True) if count]
        context_lens = [stage.length + count for stage, count in present]
        pages = [
            stage.pages[layers.start - stage.layers.start : layers.stop - stage.layers.start, : stage.blocks_for(end)]
            for (stage, _), end in zip(present, context_lens, strict=True)
        ]
        written = [
            pool.slots_of(own, range(end - count, end))
            for own, end, (_, count) in zip(pages, context_lens, present, strict=True)
        ]
        self.write_slots = to_device(np.concatenate(written, axis=1), device)
        """int64 [layers, tokens]."""
        num_blocks = [own.shape[1] for own in pages]
        if access == "paged":
            laid_out = np.stack([_widen(own, max(num_blocks)) for own in pages], axis=1)
            capacities = [max(num_blocks) * size] * len(pages)
        else:
            laid_out = np.concatenate(pages, axis=1)
            capacities = [count * size for count in num_blocks]
        self.pages = to_device(laid_out.astype(np.int32), device)
        """int32, [layers, sequences, blocks] for a kernel that reads pages, else [layers, blocks of all sequences]."""
        counted = [count for _, count in present]
        bounds = np.array([np.cumsum([0, *counted]), np.cumsum([0, *capacities]), [*context_lens, 0]], np.int32)
        self.query_starts, self.key_starts, padded = to_device(bounds, device)
        self.context_lens = padded[:-1]
        self.max_query, self.max_capacity = max(counted), max(capacities)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Write new keys and values to a layer, then attend causally from each new token to its sequence's context.

        Args:
            layer: the decoder layer.
            query: [tokens, heads, head_dim].
            key: [tokens, kv_heads, head_dim]; written into the caches, like ``value``.
            value: [tokens, kv_heads, head_dim].
            scale: factor of the scores.

        Returns:
            [tokens, heads, head_dim].
        """
        layer -= self.first_layer
        self.pool.keys.index_copy_(0, self.write_slots[layer], key)
        self.pool.values.index_copy_(0, self.write_slots[layer], value)
        return varlen_attention(
            query,
            self.pool,
            self.pages[layer],
            query_starts=self.query_starts,
            key_starts=self.key_starts,
            context_lens=self.context_lens,
            max_query=self.max_query,
            max_capacity=self.max_capacity,
            scale=scale,
        )


def varlen_attention(
    query: Tensor,
    pool: PagePool,
    pages: Tensor,
    *,
    query_starts: Tensor,
    key_starts: Tensor,
    context_lens: Tensor,
    max_query: int,
    max_capacity: int,
    scale: float,
) -> Tensor:
    """Causal attention of the queries of several sequences, each to its own pages.

    Args:
        query: [tokens, heads, head_dim], sequence after sequence.
        pool: the keys and values.
        pages: int32, [sequences, blocks] to read in place, or [blocks of all sequences] to gather first.
        query_starts: int32 [sequences + 1], where each sequence's queries begin, and where those of the last one end.
        key_starts: int32 [sequences + 1], the same for the capacities of the sequences' pages, in tokens.
        context_lens: int32 [sequences], the tokens of each context, those of its queries included.
        max_query: the most queries of a sequence.
        max_capacity: the most tokens that fit into the pages of a sequence.
        scale: factor of the scores.

    Returns:
        [tokens, heads, head_dim].
    """
    heads, head_dim = pool.keys.shape[1:]
    keys, values = (store.view(pool.pages, pool.page_size, heads, head_dim) for store in (pool.keys, pool.values))
    table: Tensor | None = pages
    starts: Tensor | None = key_starts
    if pages.dim() == 1:
        keys, values = (store.index_select(0, pages).flatten(0, 1) for store in (keys, values))
        table = None
    elif current_flash_attention_impl() is not None:
        starts = None  # only the flash attention that PyTorch is built with takes both these and a block table
    output = varlen_attn(
        query.contiguous(),
        keys,
        values,
        query_starts,
        starts,
        max_query,
        max_capacity,
        scale=scale,
        window_size=_CAUSAL,
        enable_gqa=query.shape[1] != heads,
        seqused_k=context_lens,
        block_table=table,
    )
    return cast(Tensor, output)


def page_access(pool: PagePool, heads: int) -> PageAccess | None:
    """How the kernel can read the caches of ``pool``: the first of the two ways that gives the right numbers.

    Compares each with :class:`vflowopt.runtime.attention.AttentionPlan` on a small pool of the same kind: a decode
    beside a prefill, with page boundaries within both the keys and the new tokens.

    Args:
        pool: the pool.
        heads: query heads of a layer.

    Returns:
        The way; None if neither works: without a GPU, in full precision, or if PyTorch's kernel supports neither.
    """
    ways: tuple[PageAccess, ...] = ("paged", "gathered")
    return next((access for access in ways if _agrees(pool, heads, access)), None)


@torch.inference_mode()
def _agrees(pool: PagePool, heads: int, access: PageAccess) -> bool:
    """Whether the kernel computes the right numbers with this access."""
    size, (kv_heads, head_dim) = pool.page_size, pool.keys.shape[1:]
    device, dtype = pool.keys.device, pool.keys.dtype
    budget = 16 * pool.page_bytes
    trial = PagePool(budget, page_size=size, heads=kv_heads, head_dim=head_dim, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)

    def random(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, head_dim, generator=generator).to(device, dtype)

    caches = [StagedCache(trial, [0], 1) for _ in range(2)]
    # In turn, so that neither cache's pages are contiguous.
    for counts in ((size, size), (3, size + 2)):
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve([count])
            slots = cache.stages[0].slots(range(cache.lengths[0], cache.lengths[0] + count))[0]
            trial.keys[slots], trial.values[slots] = random(count, kv_heads), random(count, kv_heads)
            cache.advance([count])
    counts = (1, 5)
    for cache, count in zip(caches, counts, strict=True):
        cache.reserve([count])
    states = random(6, heads), random(6, kv_heads), random(6, kv_heads)
    expected = AttentionPlan(trial, range(1), caches, counts).attend(0, *states, scale=head_dim**-0.5)
    try:
        plan = VarlenPlan(trial, range(1), caches, counts, access=access)
        answer = plan.attend(0, *states, scale=head_dim**-0.5)
        return torch.allclose(answer.float(), expected.float(), atol=2e-2, rtol=2e-2)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # no such kernel here, or an older one that takes no block table
        return False


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to ``device``, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _widen(pages: np.ndarray, num_blocks: int) -> np.ndarray:
    """Repeat the last page of each row [layers, n] until the row has ``num_blocks`` pages."""
    return np.pad(pages, ((0, 0), (0, num_blocks - pages.shape[1])), mode="edge")
