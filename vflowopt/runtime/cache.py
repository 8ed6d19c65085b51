"""The KV cache: one pool of fixed-size pages, and per sequence one block table and length per pruning stage.

Pruning is piecewise constant in depth, so all layers of a stage hold the same tokens and share one length. A page holds
``page_size`` tokens of *one* layer, so stages of any depth, from any strategies, share one pool without fragmenting it.
The cache stores physical slots only; a :class:`vflowopt.runtime.sequence.Sequence` knows the positions.

Pages are counted by reference. A fork shares all pages of its origin. A cache copies a shared page before it writes to
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

_LARGEST_E4M3 = 448.0


class PoolExhausted(RuntimeError):
    """The pool has fewer free pages than were asked for; none was acquired.

    Attributes:
        needed: pages asked for.
        free: pages that were free.
        total: pages in the pool.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"the KV pool has {free} of {total} pages free but {needed} are needed; "
            "release idle conversations, or start with a larger KV budget"
        )
        self.needed, self.free, self.total = needed, free, total


class PagePool:
    """A preallocated store of KV pages, counted by reference.

    Args:
        budget: bytes that keys and values may take together; rounded down to whole pages.
        page_size: tokens of a page.
        heads: key-value heads of a layer.
        head_dim: channels of a head.
        dtype: type in which keys and values are computed and read.
        stored_as: type of the stored ones; None: ``dtype``. float8_e4m3fn has a byte for each number and no scale of
            its own; see :meth:`write`.
        device: where they live.

    Attributes:
        dtype: as given.
        keys: [slots, heads, head_dim]; a slot holds one token in one layer, a page is ``page_size`` slots in a row.
        values: like ``keys``.
        key_store: the same memory as ``keys``, in a type that every operation takes: bytes for float8_e4m3fn.
        value_store: like ``key_store``.

    Raises:
        ValueError: the budget does not hold a single page.
    """

    def __init__(
        self,
        budget: int,
        *,
        page_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        stored_as: torch.dtype | None = None,
    ) -> None:
        stored_as = stored_as or dtype
        self.page_size = page_size
        self.dtype = dtype
        self.token_bytes = 2 * heads * head_dim * stored_as.itemsize
        self.page_bytes = page_size * self.token_bytes
        self.pages = budget // self.page_bytes
        if self.pages < 1:
            raise ValueError(
                f"a KV budget of {budget} bytes does not hold one page of {self.page_bytes} bytes; give it more"
            )
        shape = (self.pages * page_size, heads, head_dim)
        # Not zeroed here: a page is zeroed when it is acquired, so memory is touched only when it is used.
        self.keys = torch.empty(shape, dtype=stored_as, device=device)
        self.values = torch.empty(shape, dtype=stored_as, device=device)
        self.key_store, self.value_store = as_bytes(self.keys), as_bytes(self.values)
        self._free = list(range(self.pages - 1, -1, -1))
        self._references = [0] * self.pages

    @property
    def free_pages(self) -> int:
        """Pages without a reference."""
        return len(self._free)

    @property
    def bytes_total(self) -> int:
        """Bytes of the whole pool."""
        return self.pages * self.page_bytes

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages in use, each counted once, however many references it has."""
        return (self.pages - len(self._free)) * self.page_bytes

    def acquire(self, count: int) -> list[int]:
        """Acquire ``count`` free pages, with one reference each and all slots zero.

        Raises:
            PoolExhausted: fewer pages are free; then none is acquired.
        """
        if count > len(self._free):
            raise PoolExhausted(count, len(self._free), self.pages)
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        # Zeroed, so that nothing of the last owner reaches the new one: a masked NaN is still NaN times zero.
        fresh = self._on_device(taken)
        for store in (self.key_store, self.value_store):
            store.view(self.pages, -1).index_fill_(0, fresh, 0)
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to each of some pages in use."""
        for page in pages:
            self._references[page] += 1

    def shared(self, page: int, leaving: int = 0) -> bool:
        """Whether ``page`` has more than one reference, not counting ``leaving`` of them."""
        return self._references[page] - leaving > 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page; a page without references becomes free."""
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy the contents of each page of ``source`` to the page at the same place of ``target``."""
        from_pages, to_pages = self._on_device(source), self._on_device(target)
        for store in (self.key_store, self.value_store):
            by_page = store.view(self.pages, -1)
            by_page.index_copy_(0, to_pages, by_page.index_select(0, from_pages))

    @property
    def rounds(self) -> bool:
        """Whether what is read differs from what was written, because it is stored in another type."""
        return self.keys.dtype != self.dtype

    @property
    def is_e4m3(self) -> bool:
        """Whether the numbers are stored as float8_e4m3fn."""
        return self.keys.dtype == torch.float8_e4m3fn

    def stored(self, states: Tensor) -> Tensor:
        """States in the stores' type. In float8_e4m3fn, numbers beyond the largest one, 448, become that one."""
        if self.is_e4m3:
            return as_bytes(states.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn))
        return states.to(self.keys.dtype)

    def computed(self, stored: Tensor) -> Tensor:
        """What is in a store, or what :meth:`stored` returned, in the type ``dtype``."""
        if self.is_e4m3:
            # bfloat16 holds each of these numbers, and PyTorch converts to it several times as fast as to float32.
            return stored.view(torch.float8_e4m3fn).to(torch.bfloat16).to(self.dtype)
        return stored.to(self.dtype)

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Write keys and values, each [tokens, heads, head_dim], to ``slots``, int64 [tokens]."""
        self.key_store.index_copy_(0, slots, self.stored(key))
        self.value_store.index_copy_(0, slots, self.stored(value))

    def last_slots(self, pages: Tensor, context_lens: Tensor) -> Tensor:
        """The slot of the last token of each context, int64 [batch], computed on the device.

        Args:
            pages: int32 [batch, blocks].
            context_lens: int32 [batch].
        """
        last = (context_lens - 1).long()
        page = pages.gather(1, (last // self.page_size)[:, None])[:, 0]
        return page * self.page_size + last % self.page_size

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values, each [tokens, heads, head_dim] of type ``dtype``, at ``slots``."""
        keys, values = (self.computed(store.index_select(0, slots)) for store in (self.key_store, self.value_store))
        return keys, values

    def read_pages(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values, each [pages * page_size, heads, head_dim], of whole pages, int [pages]."""
        # Whole pages are gathered: they are long enough to be copied at memory speed.
        keys, values = (
            self.computed(store.view(self.pages, -1).index_select(0, pages)).view(-1, *store.shape[1:])
            for store in (self.key_store, self.value_store)
        )
        return keys, values

    def _on_device(self, pages: Sequence[int]) -> Tensor:
        """Pages as an index on the pool's device, int64 [pages], without waiting for the device."""
        index = torch.tensor(pages, dtype=torch.int64, pin_memory=self.keys.is_cuda)
        return index.to(self.keys.device, non_blocking=True)

    def slots_of(self, pages: np.ndarray, tokens: range) -> np.ndarray:
        """The slots, int64 [rows, tokens], of consecutive tokens in each row of ``pages``.

        Args:
            pages: int64 [rows, blocks].
            tokens: which tokens of a row.
        """
        places = np.arange(tokens.start, tokens.stop)
        slots = pages[:, places // self.page_size] * self.page_size + places % self.page_size
        return np.ascontiguousarray(slots)

    def check_integrity(self, owners: Iterable[StagedCache]) -> None:
        """Check that each page is free, or has as many references as ``owners`` have to it.

        Raises:
            AssertionError: a page is lost, or its references and its owners differ.
        """
        owned = Counter(page for owner in owners for page in owner.owned_pages())
        wrong = [page for page in range(self.pages) if self._references[page] != owned[page]]
        free = Counter(self._free)
        astray = [page for page in range(self.pages) if free[page] != (0 if self._references[page] else 1)]
        if wrong or astray:
            raise AssertionError(
                f"KV pool corrupt: references differ from owners at pages {wrong[:8]}, free list wrong at {astray[:8]}"
            )


class StageTable:
    """The block table and length that the layers of one stage share.

    Args:
        pool: where the pages come from.
        layers: the decoder layers of the stage.

    Attributes:
        layers: as given.
        length: cached tokens.
        block_table: for each block of ``page_size`` tokens, its page in each layer.
        pages: the same as int64 [layers, blocks].
    """

    def __init__(self, pool: PagePool, layers: range) -> None:
        self.pool = pool
        self.layers = layers
        self.length = 0
        # A list per block, and not per layer: growing, sharing and truncating work on whole blocks.
        self.block_table: list[list[int]] = []
        self.pages = np.empty((len(layers), 0), np.int64)

    def blocks_for(self, length: int) -> int:
        """The number of blocks for ``length`` tokens; a block is one page in each layer of the stage."""
        return -(-length // self.pool.page_size)

    def pages_for(self, length: int) -> int:
        """The number of pages for ``length`` tokens, over all layers of the stage."""
        return self.blocks_for(length) * len(self.layers)

    def pages_to_write(self, more: int, leaving: Counter[int] | None = None) -> int:
        """Pages to acquire before ``more`` tokens can be written: for new blocks, and to copy a shared last block.

        Args:
            more: tokens to write.
            leaving: for each page, how many of its owners will copy it first; this call adds itself.
        """
        if not more:
            return 0
        # Called for every stage in every step: most often one more token fits into the last block.
        place, used = divmod(self.length, self.pool.page_size)
        blocks = len(self.block_table)
        fits = place < blocks and used + more <= (blocks - place) * self.pool.page_size
        new = 0 if fits else (self.blocks_for(self.length + more) - blocks) * len(self.layers)
        if place == blocks:
            return new
        page = self.block_table[place][0]
        if not self.pool.shared(page, leaving[page] if leaving else 0):
            return new
        if leaving is not None:
            leaving[page] += 1
        return new + len(self.layers)

    def make_writable(self, pages: list[int]) -> None:
        """Add exactly :meth:`pages_to_write` pages, so that the next tokens are written to no shared page."""
        if not pages:
            return
        first, depth = len(self.block_table), len(self.layers)
        if self._last_block_shared():
            first = self.length // self.pool.page_size
            old, self.block_table[first], pages = self.block_table[first], pages[:depth], pages[depth:]
            self.pool.copy(old, self.block_table[first])
            self.pool.release(old)
        self.block_table += [pages[start : start + depth] for start in range(0, len(pages), depth)]
        self._update_pages(first)

    def truncate(self, length: int) -> None:
        """Drop all but the first ``length`` tokens, and release the blocks after them.

        Raises:
            ValueError: there are fewer tokens.
        """
        if length > self.length:
            raise ValueError(f"cannot truncate a stage of {self.length} tokens to {length}")
        self.length = length
        cut = self.block_table[self.blocks_for(length) :]
        if cut:
            del self.block_table[self.blocks_for(length) :]
            self.pool.release(page for block in cut for page in block)
            self._update_pages(len(self.block_table))

    def fork(self) -> StageTable:
        """A table over the same tokens, which shares their pages."""
        twin = StageTable(self.pool, self.layers)
        twin.length = self.length
        twin.block_table = [list(block) for block in self.block_table[: self.blocks_for(self.length)]]
        self.pool.share(page for block in twin.block_table for page in block)
        twin._update_pages(0)
        return twin

    def slots(self, tokens: range | None = None) -> Tensor:
        """The pool's slots, int64 [layers, tokens], of some tokens in each layer; by default of all cached tokens."""
        slots = self.pool.slots_of(self.pages, range(self.length) if tokens is None else tokens)
        return torch.from_numpy(slots).to(self.pool.keys.device)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies of all keys and values of ``layer``, each [length, heads, head_dim]."""
        return self.pool.read(self.slots()[layer - self.layers.start])

    def _last_block_shared(self) -> bool:
        """Whether the next token falls into a block that is shared."""
        place = self.length // self.pool.page_size
        return place < len(self.block_table) and self.pool.shared(self.block_table[place][0])

    def _update_pages(self, first: int) -> None:
        """Update ``pages`` from the block table, whose blocks before ``first`` are unchanged."""
        # Only what changed: otherwise each new block of a long sequence would cost as much as all its blocks.
        grown = np.array(self.block_table[first:], np.int64).reshape(-1, len(self.layers)).T
        self.pages = np.concatenate((self.pages[:, :first], grown), axis=1)


class StagedCache:
    """The keys and values of one sequence: a :class:`StageTable` per pruning stage.

    Args:
        pool: where the pages come from.
        starts: first decoder layer of each stage, ascending, the first one 0.
        layers: number of decoder layers.

    Attributes:
        pool: as given.
        stages: the table of each stage.
        stage_of_layer: the stage of each decoder layer.
    """

    def __init__(self, pool: PagePool, starts: Sequence[int], layers: int) -> None:
        ends = (*starts[1:], layers)
        self.pool = pool
        self.stages = [StageTable(pool, range(start, end)) for start, end in zip(starts, ends, strict=True)]
        self.stage_of_layer = [index for index, stage in enumerate(self.stages) for _ in stage.layers]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cached tokens of each stage."""
        return tuple(stage.length for stage in self.stages)

    @property
    def bytes_held(self) -> int:
        """Bytes of the cache's pages, shared ones included."""
        return sum(len(stage.block_table) * len(stage.layers) for stage in self.stages) * self.pool.page_bytes

    @property
    def frees_pages(self) -> bool:
        """Whether releasing the cache would free pages: some are not shared."""
        return any(not self.pool.shared(page) for page in self.owned_pages())

    def reserve(self, tokens: Sequence[int]) -> None:
        """Acquire pages for ``tokens[s]`` more tokens in each stage ``s``; lengths do not change yet.

        Raises:
            PoolExhausted: too few pages are free; nothing changed.
        """
        reserve([self], [tokens])

    def advance(self, tokens: Sequence[int]) -> None:
        """Count ``tokens[s]`` tokens, written to pages reserved before, as cached."""
        for stage, more in zip(self.stages, tokens, strict=True):
            stage.length += more

    def truncate(self, lengths: Sequence[int]) -> None:
        """Drop all but the first ``lengths[s]`` tokens of each stage ``s``, and release pages that become empty.

        Raises:
            ValueError: a stage holds fewer.
        """
        for stage, length in zip(self.stages, lengths, strict=True):
            stage.truncate(length)

    def free(self) -> None:
        """Release every page; the cache is empty and usable afterwards."""
        self.truncate([0] * len(self.stages))

    def fork(self) -> StagedCache:
        """A second cache over the same tokens; a page is shared until one of the two writes to it."""
        twin = StagedCache(self.pool, [stage.layers.start for stage in self.stages], len(self.stage_of_layer))
        twin.stages = [stage.fork() for stage in self.stages]
        return twin

    def owned_pages(self) -> list[int]:
        """Every page of the cache, in no particular order."""
        return [page for stage in self.stages for block in stage.block_table for page in block]


def reserve(caches: Sequence[StagedCache], tokens: Sequence[Sequence[int]]) -> None:
    """Acquire pages for ``tokens[c][s]`` more tokens in stage ``s`` of each cache ``c``: for all of them, or for none.

    Args:
        caches: all different, all of one pool.
        tokens: per cache and stage.

    Raises:
        PoolExhausted: too few pages are free; nothing changed.
    """
    # Of the caches that share a block, the last one to write to it keeps it and needs no copy.
    leaving: Counter[int] = Counter()
    stages = [stage for cache in caches for stage in cache.stages]
    counts = [count for each in tokens for count in each]
    wanted = [stage.pages_to_write(more, leaving) for stage, more in zip(stages, counts, strict=True)]
    if not any(wanted):
        return
    pages = iter(caches[0].pool.acquire(sum(wanted)))
    for stage, count in zip(stages, wanted, strict=True):
        stage.make_writable(list(islice(pages, count)))


def as_bytes(states: Tensor) -> Tensor:
    """A view of states in float8_e4m3fn as bytes, because few operations take that type; others as they are."""
    return states.view(torch.uint8) if states.dtype == torch.float8_e4m3fn else states
