"""Attention on a device with Triton kernels that read pages of any size in place.

All sequences of a batch, prefills and decodes alike, take part in the same launches, each with its own block table and
length for each stage. See :mod:`vflowopt.runtime.ragged_kernels` for the arithmetic; here the work is cut into tiles.

Triton comes with PyTorch's builds for CUDA. Without it this module cannot be imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from vflowopt.runtime import ragged_kernels as kernels
from vflowopt.runtime.backend import BackendName
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.transfer import to_device

_MOST_SPLITS = 32
_LEAST_KEYS = 128
"""Keys of a split at least: fewer cost more to combine than they save."""


@dataclass(frozen=True)
class Tiling:
    """How one launch is cut.

    Attributes:
        rows: rows of a tile, a power of two; a row is one query with one of the heads that share a key head.
        keys: keys in one step, a power of two, 16 at least.
        warps: of a program.
        stages: how many steps ahead keys are loaded.
    """

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


def tilings(group: int, head_dim: int, dtype: torch.dtype) -> tuple[Tiling, Tiling]:
    """The tilings of short tiles, for decodes, and of tall ones, for prefills.

    Chosen so that a program fits into the 99 KiB of shared memory of the smallest device; not measured yet.

    Args:
        group: query heads that share a key head.
        head_dim: channels of a head.
        dtype: type of the queries.
    """
    wide = head_dim * dtype.itemsize
    least = max(16, triton.next_power_of_2(group))
    keys = 64 if wide <= 256 else 32 if wide <= 512 else 16
    tall = 64 if wide <= 256 else 32
    return Tiling(least, keys), Tiling(max(least, tall), keys)


class Geometry:
    """The heads of a model and the pages of its pool, as the kernels take them.

    Args:
        pool: the keys and values.
        heads: query heads of a layer.
        chosen: the tilings of short and tall tiles; None: :func:`tilings` chooses.
        splits: how many programs share the keys of a tile; None: as many as keep the device busy.

    Raises:
        ValueError: the key heads do not divide the query heads.
    """

    def __init__(
        self,
        pool: PagePool,
        heads: int,
        *,
        chosen: tuple[Tiling, Tiling] | None = None,
        splits: int | None = None,
    ) -> None:
        self.kv_heads, self.head_dim = pool.keys.shape[1:]
        if heads % self.kv_heads:
            raise ValueError(f"{heads} query heads cannot share {self.kv_heads} key heads")
        self.pool = pool
        self.group = heads // self.kv_heads
        self.short, self.tall = chosen or tilings(self.group, self.head_dim, pool.dtype)
        self._splits = splits
        device = pool.keys.device
        # Two programs for each processor of the device; one that is interpreted splits nothing by itself.
        self._programs = (
            2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        )

    def splits(self, context_len: int, tiles: int) -> int:
        """How many programs share the keys of a tile.

        Args:
            context_len: keys that the tile attends to, or may attend to.
            tiles: tiles in the batch.
        """
        if self._splits is not None:
            return self._splits
        idle = self._programs // (tiles * self.kv_heads)
        return max(1, min(idle, _MOST_SPLITS, context_len // _LEAST_KEYS))


class Launch:
    """Tiles of one height, on the device.

    Args:
        geometry: heads and pages.
        tiling: how the tiles are cut.
        tiles: for each, its sequence, its first query, and by how many programs its keys are shared.
    """

    def __init__(self, geometry: Geometry, tiling: Tiling, tiles: Sequence[tuple[int, int, int]]) -> None:
        self.tiling = tiling
        rows: list[tuple[int, int, int, int, int]] = []
        first_splits: list[tuple[int, int, int, int, int]] = []
        partials = 0
        for sequence, first, splits in tiles:
            place = partials if splits > 1 else 0
            cut = [(sequence, first, split, splits, place + split) for split in range(splits)]
            rows += cut
            if splits > 1:
                first_splits.append(cut[0])
                partials += splits
        device = geometry.pool.keys.device
        self.tiles = to_device(np.array(rows, np.int32), device)
        self.split = to_device(np.array(first_splits, np.int32), device) if first_splits else None
        shape = (max(partials, 1), geometry.kv_heads, tiling.rows)
        self._outputs = torch.empty((*shape, geometry.head_dim), dtype=torch.float32, device=device)
        self._lses = torch.empty(shape, dtype=torch.float32, device=device)

    def run(
        self,
        geometry: Geometry,
        query: Tensor,
        output: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        scale: float,
    ) -> None:
        """Attend from the tiles' queries, and write the result to ``output``; see :func:`attend`."""
        pool, tiling = geometry.pool, self.tiling
        shared = {
            "KV_HEADS": geometry.kv_heads,
            "GROUP": geometry.group,
            "HEAD_DIM": geometry.head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(geometry.head_dim)),
            "ROWS": tiling.rows,
        }
        kernels.attention_kernel[(len(self.tiles), geometry.kv_heads)](
            output,
            self._outputs,
            self._lses,
            query,
            pool.key_store,
            pool.value_store,
            self.tiles,
            query_starts,
            context_lens,
            block_tables,
            block_tables.stride(0),
            query.stride(0),
            query.stride(1),
            scale * math.log2(math.e),
            PAGE_SIZE=pool.page_size,
            KEYS=tiling.keys,
            E4M3=pool.is_e4m3,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **shared,
        )
        if self.split is not None:
            kernels.combine_kernel[(len(self.split), geometry.kv_heads)](
                output, self._outputs, self._lses, self.split, query_starts, num_warps=4, **shared
            )


def write(
    pool: PagePool,
    key: Tensor,
    value: Tensor,
    sequences: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
) -> None:
    """Write the keys and values of new tokens to their slots in one layer.

    Args:
        pool: where the pages are.
        key: [tokens, kv_heads, head_dim], whose channels are adjacent in memory; like ``value``.
        value: [tokens, kv_heads, head_dim].
        sequences: int32 [tokens], the sequence of each.
        query_starts: int32 [sequences + 1], where each sequence's tokens begin, and where those of the last one end.
        context_lens: int32 [sequences], the tokens of each context, the new ones included.
        block_tables: int32 [sequences, blocks], the pages of the layer.
    """
    kv_heads, head_dim = pool.keys.shape[1:]
    kernels.write_kernel[(len(key),)](
        pool.key_store,
        pool.value_store,
        key,
        value,
        sequences,
        query_starts,
        context_lens,
        block_tables,
        block_tables.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(kv_heads * head_dim),
        PAGE_SIZE=pool.page_size,
        E4M3=pool.is_e4m3,
    )


class RaggedPlan:
    """Where the tokens of a flat batch are written and read, for a run of layers within which no cache changes stage.

    The same as :class:`vflowopt.runtime.attention.AttentionPlan`, in any order of decodes and prefills. The host does
    not wait for the device.

    Args:
        geometry: heads and pages.
        layers: the run of layers.
        caches: the caches of the batch, in order, with pages reserved.
        counts: how many tokens each sequence runs in these layers; 0 for one of which none comes this far.
    """

    def __init__(self, geometry: Geometry, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]) -> None:
        self.geometry = geometry
        self.first_layer = layers.start
        pool = geometry.pool
        stages = [cache.stages[cache.stage_of_layer[layers.start]] for cache in caches]
        context_lens = [stage.length + count for stage, count in zip(stages, counts, strict=True)]
        blocks = max(stage.blocks_for(end) for stage, end in zip(stages, context_lens, strict=True))
        tables = np.zeros((len(layers), len(caches), blocks), np.int32)
        for row, (stage, end) in enumerate(zip(stages, context_lens, strict=True)):
            used = stage.blocks_for(end)
            first = layers.start - stage.layers.start
            tables[:, row, :used] = stage.pages[first : first + len(layers), :used]
        # One copy to the device for everything.
        parts = (
            tables.reshape(-1),
            np.cumsum([0, *counts]),
            np.array(context_lens),
            np.repeat(np.arange(len(counts)), counts),
        )
        joined = to_device(np.concatenate(parts).astype(np.int32), pool.keys.device)
        laid_out, self.query_starts, self.context_lens, self.sequences = joined.split([len(part) for part in parts])
        self.block_tables = laid_out.view(tables.shape)
        """int32 [layers, sequences, blocks]."""
        self.launches = [
            Launch(geometry, tiling, tiles) for tiling, tiles in _tiles(geometry, counts, context_lens) if tiles
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See :meth:`vflowopt.runtime.attention.AttentionPlan.attend`."""
        table = self.block_tables[layer - self.first_layer]
        bounds = self.query_starts, self.context_lens, table
        write(self.geometry.pool, key, value, self.sequences, *bounds)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for launch in self.launches:
            launch.run(self.geometry, query, output, *bounds, scale)
        return output


class RaggedDecodes:
    """Attention of one new token of each of a fixed number of sequences: the same launches whatever their lengths.

    Args:
        geometry: heads and pages.
        batch: number of sequences.
        capacity: the most tokens of a sequence.
    """

    def __init__(self, geometry: Geometry, batch: int, capacity: int) -> None:
        self._geometry = geometry
        self._starts = torch.arange(batch + 1, dtype=torch.int32, device=geometry.pool.keys.device)
        splits = geometry.splits(capacity, batch)
        self._launch = Launch(geometry, geometry.short, [(row, 0, splits) for row in range(batch)])

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, pages: Tensor, context_lens: Tensor, scale: float
    ) -> Tensor:
        """See :class:`vflowopt.runtime.backend.DecodeAttention`."""
        bounds = self._starts, context_lens, pages
        write(self._geometry.pool, key, value, self._starts[:-1], *bounds)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._launch.run(self._geometry, query, output, *bounds, scale)
        return output


class RaggedBackend:
    """The kernels as a :class:`vflowopt.runtime.backend.Backend`.

    Args:
        pool: the pages.
        heads: query heads of a layer.
        chosen: see :class:`Geometry`, also for ``splits``.
        splits: how many programs share the keys of a tile.

    Raises:
        ValueError: the key heads do not divide the query heads.
    """

    name: BackendName = "triton"
    in_place = True

    def __init__(
        self,
        pool: PagePool,
        heads: int,
        *,
        chosen: tuple[Tiling, Tiling] | None = None,
        splits: int | None = None,
    ) -> None:
        self._geometry = Geometry(pool, heads, chosen=chosen, splits=splits)

    def plan(self, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]) -> RaggedPlan:
        """See :meth:`vflowopt.runtime.backend.Backend.plan`."""
        return RaggedPlan(self._geometry, layers, caches, counts)

    def decodes(self, batch: int, blocks: int) -> RaggedDecodes:
        """See :meth:`vflowopt.runtime.backend.Backend.decodes`."""
        return RaggedDecodes(self._geometry, batch, blocks * self._geometry.pool.page_size)


def _tiles(
    geometry: Geometry, counts: Sequence[int], context_lens: Sequence[int]
) -> list[tuple[Tiling, list[tuple[int, int, int]]]]:
    """Cut the new tokens into tiles: short ones of sequences with few, and tall ones."""
    cut: dict[Tiling, list[tuple[int, int]]] = {geometry.short: [], geometry.tall: []}
    for sequence, count in enumerate(counts):
        tiling = geometry.short if count * geometry.group <= geometry.short.rows else geometry.tall
        cut[tiling] += [(sequence, first) for first in range(0, count, tiling.rows // geometry.group)]
    number = sum(map(len, cut.values()))
    return [
        (tiling, [(sequence, first, geometry.splits(context_lens[sequence], number)) for sequence, first in tiles])
        for tiling, tiles in cut.items()
    ]
