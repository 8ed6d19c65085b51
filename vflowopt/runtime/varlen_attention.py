"""Attention of the decoder on a CUDA device: PyTorch's variable-length flash attention over the paged cache.

One kernel call serves all sequences of a batch, prefills and decodes alike, whereas
:class:`vflowopt.runtime.attention.AttentionPlan` makes one call for each prefill. The kernel needs half precision. How
it reads the cache depends on the version of flash attention:

- ``"paged"``: in place, through a block table. Flash attention 3 takes pages of any size. The version that PyTorch is
  built with takes only pages of a multiple of 256 tokens, which would waste most of a pruned cache.
- ``"gathered"``: from a copy in which each sequence's pages are contiguous.

:func:`vflowopt.runtime.backend_choice.choose_backend` finds out by trial which of the two works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from vflowopt.runtime.backend import BackendName, DecodeAttention, Plan
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.transfer import to_device

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention import current_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a PyTorch that lacks one of them
    varlen_attn = None

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
        """See :meth:`vflowopt.runtime.attention.AttentionPlan.attend`."""
        layer -= self.first_layer
        self.pool.write(self.write_slots[layer], key, value)
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
    if varlen_attn is None:
        raise RuntimeError("this PyTorch has no variable-length attention")
    heads, head_dim = pool.keys.shape[1:]
    table: Tensor | None = pages
    starts: Tensor | None = key_starts
    if pages.dim() == 1:
        keys, values = pool.read_pages(pages)
        table = None
    else:
        keys, values = (store.view(pool.pages, pool.page_size, heads, head_dim) for store in (pool.keys, pool.values))
    if table is not None and current_flash_attention_impl() is not None:
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


class VarlenDecodes:
    """Attention of one new token of each of a fixed number of sequences.

    Args:
        pool: the pages, of half precision.
        batch: number of sequences.
        blocks: the most blocks of a sequence.
        access: how the kernel reads the cache.
    """

    def __init__(self, pool: PagePool, batch: int, blocks: int, access: PageAccess) -> None:
        self._pool = pool
        self._access = access
        self._capacity = blocks * pool.page_size
        self._query_starts = torch.arange(batch + 1, dtype=torch.int32, device=pool.keys.device)
        self._key_starts = self._query_starts * self._capacity

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, pages: Tensor, context_lens: Tensor, scale: float
    ) -> Tensor:
        """See :class:`vflowopt.runtime.backend.DecodeAttention`."""
        self._pool.write(self._pool.last_slots(pages, context_lens), key, value)
        return varlen_attention(
            query,
            self._pool,
            pages if self._access == "paged" else pages.flatten(),
            query_starts=self._query_starts,
            key_starts=self._key_starts,
            context_lens=context_lens,
            max_query=1,
            max_capacity=self._capacity,
            scale=scale,
        )


class VarlenBackend:
    """PyTorch's variable-length flash attention.

    Args:
        pool: the pages.
        access: how the kernel reads them.
    """

    name: BackendName = "varlen"

    def __init__(self, pool: PagePool, access: PageAccess) -> None:
        self._pool = pool
        self.access = access
        self.in_place = access == "paged"

    def plan(self, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]) -> Plan:
        """See :meth:`vflowopt.runtime.backend.Backend.plan`."""
        return VarlenPlan(self._pool, layers, caches, counts, access=self.access)

    def decodes(self, batch: int, blocks: int) -> DecodeAttention:
        """See :meth:`vflowopt.runtime.backend.Backend.decodes`."""
        return VarlenDecodes(self._pool, batch, blocks, self.access)


def _widen(pages: np.ndarray, num_blocks: int) -> np.ndarray:
    """Repeat the last page of each row [layers, n] until the row has ``num_blocks`` pages."""
    return np.pad(pages, ((0, 0), (0, num_blocks - pages.shape[1])), mode="edge")
