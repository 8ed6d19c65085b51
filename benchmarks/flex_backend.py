"""FlexAttention over a block mask of pages, as a rival of the attention backends.

The pool is one long sequence of keys, of which the block mask picks each sequence's pages: every page is a block, and
the block indices are physical pages. Decodes are rows of a batch, and each prefill is a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vflowopt.runtime.backend import Plan
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.transfer import to_device

_QUERIES = 128
"""Queries of a block."""


class FlexBackend:
    """A :class:`vflowopt.runtime.backend.Backend`.

    Args:
        pool: the pages, of the type of the queries.
        heads: query heads of a layer.
    """

    name: Literal["sdpa"] = "sdpa"  # it is none of the library's
    in_place = True

    def __init__(self, pool: PagePool, heads: int) -> None:
        if pool.rounds:
            raise ValueError("FlexAttention reads pages of the type of the queries")
        self.pool = pool
        self.grouped = heads != pool.keys.shape[1]

    def plan(self, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]) -> Plan:
        """See :meth:`vflowopt.runtime.backend.Backend.plan`."""
        return _FlexPlan(self, layers, caches, counts)

    def decodes(self, batch: int, blocks: int) -> _FlexDecodes:
        """See :meth:`vflowopt.runtime.backend.Backend.decodes`."""
        return _FlexDecodes(self, batch, blocks)

    def mask(self, pages: Tensor, context_lens: Tensor, counts: int) -> BlockMask:
        """The mask for ``counts`` new tokens of each sequence, made on the device.

        Args:
            pages: int32 [sequences, blocks].
            context_lens: int32 [sequences].
            counts: new tokens of each.
        """
        size, device = self.pool.page_size, pages.device
        batch, blocks = pages.shape
        used = (context_lens + size - 1) // size
        # The place of each page in each sequence, -1 where it has none; what pads a table goes to a column of its own.
        place = torch.full((batch, self.pool.pages + 1), -1, dtype=torch.int32, device=device)
        number = torch.arange(blocks, dtype=torch.int32, device=device).expand(batch, blocks)
        target = torch.where(number < used[:, None], pages, self.pool.pages)
        place.scatter_(1, target.long(), number)
        first = context_lens - counts

        def sees(sequence: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
            block = place[sequence, slot // size]
            return (block >= 0) & (block * size + slot % size <= first[sequence] + query)

        rows = -(-counts // _QUERIES)
        return BlockMask.from_kv_blocks(
            used.to(torch.int32)[:, None, None].expand(batch, 1, rows).contiguous(),
            pages[:, None, None].expand(batch, 1, rows, blocks).contiguous(),
            BLOCK_SIZE=(_QUERIES, size),
            mask_mod=sees,
            seq_lengths=(counts, self.pool.pages * size),
            compute_q_blocks=False,  # only gradients need them
        )

    def attend(self, query: Tensor, mask: BlockMask, scale: float) -> Tensor:
        """Attention of [sequences, tokens, heads, head_dim] to the pages; returns the same shape."""
        keys, values = (store.transpose(0, 1)[None] for store in (self.pool.keys, self.pool.values))
        options = {"BLOCK_N": self.pool.page_size} if query.is_cuda else None
        function = _compiled() if query.is_cuda else flex_attention
        output = function(
            query.transpose(1, 2),
            keys,
            values,
            block_mask=mask,
            scale=scale,
            enable_gqa=self.grouped,
            kernel_options=options,
        )
        result: Tensor = output.transpose(1, 2)
        return result


class _FlexPlan:
    def __init__(
        self, backend: FlexBackend, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]
    ) -> None:
        self._backend = backend
        self._first_layer = layers.start
        device, pool = backend.pool.keys.device, backend.pool
        stages = [cache.stages[cache.stage_of_layer[layers.start]] for cache in caches]
        ends = [stage.length + count for stage, count in zip(stages, counts, strict=True)]
        pages = [
            stage.pages[layers.start - stage.layers.start : layers.stop - stage.layers.start, : stage.blocks_for(end)]
            for stage, end in zip(stages, ends, strict=True)
        ]
        slots = [
            pool.slots_of(own, range(end - count, end)) for own, end, count in zip(pages, ends, counts, strict=True)
        ]
        self._slots = to_device(np.concatenate(slots, axis=1), device)
        starts = np.cumsum([0, *counts])
        decodes = [place for place, count in enumerate(counts) if count == 1]
        groups = [decodes] if decodes else []
        groups += [[place] for place, count in enumerate(counts) if count > 1]
        # Per layer, for each call: which tokens of the batch, and the mask.
        self._calls: list[list[tuple[Tensor, BlockMask]]] = []
        for layer in range(len(layers)):
            calls = []
            for group in groups:
                widest = max(pages[place].shape[1] for place in group)
                own = [pages[place][layer] for place in group]
                rows = [np.pad(row, (0, widest - len(row)), mode="edge") for row in own]
                table = to_device(np.stack(rows).astype(np.int32), device)
                lens = to_device(np.array([ends[place] for place in group], np.int32), device)
                tokens = np.stack([np.arange(starts[place], starts[place + 1]) for place in group])
                calls.append((to_device(tokens, device), backend.mask(table, lens, counts[group[0]])))
            self._calls.append(calls)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        layer -= self._first_layer
        self._backend.pool.write(self._slots[layer], key, value)
        output = torch.empty_like(query)
        for tokens, mask in self._calls[layer]:
            output[tokens] = self._backend.attend(query[tokens], mask, scale)
        return output


class _FlexDecodes:
    def __init__(self, backend: FlexBackend, batch: int, blocks: int) -> None:
        self._backend = backend

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, pages: Tensor, context_lens: Tensor, scale: float
    ) -> Tensor:
        pool = self._backend.pool
        pool.write(pool.last_slots(pages, context_lens), key, value)
        return self._backend.attend(query[:, None], self._backend.mask(pages, context_lens, 1), scale)[:, 0]


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
