"""The KV cache: one pool of fixed-size pages, and per sequence one block table and length per pruning stage.

Pruning is piecewise constant in depth, so all layers of a stage hold the same tokens and share one length. A page holds
``page_size`` tokens of *one* layer: stages of any depth, cut differently by different strategies, then live in one
pool without fragmenting it. The cache stores physical slots only; positions are the sequence's business.

Pages are counted by reference. A fork shares all pages of its origin, and whoever writes into a page that others hold,
too, gets a copy of it first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor


class PoolExhausted(RuntimeError):
    """The pool has fewer free pages than were asked for; nothing was taken.

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
        dtype: type of the stored keys and values.
        device: where they live.

    Attributes:
        keys: [slots, heads, head_dim]; a slot holds one token in one layer, a page is ``page_size`` slots in a row.
        values: like ``keys``.

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
    ) -> None:
        self.page_size = page_size
        self.token_bytes = 2 * heads * head_dim * dtype.itemsize
        self.page_bytes = page_size * self.token_bytes
        self.pages = budget // self.page_bytes
        if self.pages < 1:
            raise ValueError(
                f"a KV budget of {budget} bytes does not hold one page of {self.page_bytes} bytes; give it more"
            )
        shape = (self.pages * page_size, heads, head_dim)
        # Not zeroed as a whole: a page is when it is taken, so memory is touched only as it is used.
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._free = list(range(self.pages - 1, -1, -1))
        self._references = [0] * self.pages

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def bytes_total(self) -> int:
        """Bytes of the whole pool."""
        return self.pages * self.page_bytes

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages that are held, each counted once however many hold it."""
        return (self.pages - len(self._free)) * self.page_bytes

    def acquire(self, count: int) -> list[int]:
        """Take ``count`` free pages, with one reference each.

        Raises:
            PoolExhausted: fewer are free; nothing is taken then.
        """
        if count > len(self._free):
            raise PoolExhausted(count, len(self._free), self.pages)
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        # What the last owner left behind must not reach the new one: a masked NaN is still NaN times zero.
        fresh = self._on_device(taken)
        self.keys.view(self.pages, -1).index_fill_(0, fresh, 0)
        self.values.view(self.pages, -1).index_fill_(0, fresh, 0)
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to pages that are held."""
        for page in pages:
            self._references[page] += 1

    def shared(self, page: int, leaving: int = 0) -> bool:
        """Whether more than one holds ``page``, once ``leaving`` of them do not any more."""
        return self._references[page] - leaving > 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page; those that nobody holds any more become free."""
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy the contents of pages."""
        from_pages, to_pages = self._on_device(source), self._on_device(target)
        for store in (self.keys, self.values):
            by_page = store.view(self.pages, -1)
            by_page.index_copy_(0, to_pages, by_page.index_select(0, from_pages))

    def _on_device(self, pages: Sequence[int]) -> Tensor:
        """Pages as an index where they live, without waiting for the device."""
        index = torch.tensor(pages, dtype=torch.int64, pin_memory=self.keys.is_cuda)
        return index.to(self.keys.device, non_blocking=True)

    def slots_of(self, pages: np.ndarray, tokens: range) -> np.ndarray:
        """The slots, int64 [rows, tokens], of tokens that lie one after the other in each row of ``pages``.

        Args:
            pages: int64 [rows, n].
            tokens: which tokens of a row.
        """
        places = np.arange(tokens.start, tokens.stop)
        slots = pages[:, places // self.page_size] * self.page_size + places % self.page_size
        return np.ascontiguousarray(slots)

    def check_integrity(self, owners: Iterable[StagedCache]) -> None:
        """Prove that each page is either free or held, exactly as often as ``owners`` hold it.

        Raises:
            AssertionError: a page is lost, or its references and its owners differ.
        """
        held = Counter(page for owner in owners for page in owner.owned_pages())
        wrong = [page for page in range(self.pages) if self._references[page] != held[page]]
        free = Counter(self._free)
        astray = [page for page in range(self.pages) if free[page] != (0 if self._references[page] else 1)]
        if wrong or astray:
            raise AssertionError(
                f"KV pool corrupt: references differ from owners at pages {wrong[:8]}, free list wrong at {astray[:8]}"
            )


class StageTable:
    """The block table and length that the layers of one stage share.

    Attributes:
        layers: the decoder layers of the stage.
        length: tokens held.
        pages: int64 [layers, blocks], the page of each block in each layer.
    """

    def __init__(self, pool: PagePool, layers: range) -> None:
        self.pool = pool
        self.layers = layers
        self.length = 0
        # One list of pages per layer would do; one per block is what growing, sharing and cutting touch.
        self.block_table: list[list[int]] = []
        self.pages = np.empty((len(layers), 0), np.int64)

    def blocks_for(self, length: int) -> int:
        """Blocks that ``length`` tokens take; a block is one page in each layer of the stage."""
        return -(-length // self.pool.page_size)

    def pages_for(self, length: int) -> int:
        """Pages, over all layers of the stage, that ``length`` tokens take."""
        return self.blocks_for(length) * len(self.layers)

    def pages_to_write(self, more: int, leaving: Counter[int] | None = None) -> int:
        """Pages to take before ``more`` tokens can be written: new ones, and a copy of a last block that is shared.

        Args:
            more: tokens to write.
            leaving: how many of those who hold a page get a copy of it before; counts this one, too.
        """
        if not more:
            return 0
        # Asked for every stage in every step: most often one more token fits into the last block.
        place, room = divmod(self.length, self.pool.page_size)
        blocks = len(self.block_table)
        fits = place < blocks and room + more <= (blocks - place) * self.pool.page_size
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
        """Use exactly :meth:`pages_to_write` pages to make room for tokens that nobody else sees."""
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
        """Forget all but the first ``length`` tokens and give back the blocks that they do not reach."""
        if length > self.length:
            raise ValueError(f"cannot truncate a stage of {self.length} tokens to {length}")
        self.length = length
        cut = self.block_table[self.blocks_for(length) :]
        if cut:
            del self.block_table[self.blocks_for(length) :]
            self.pool.release(page for block in cut for page in block)
            self._update_pages(len(self.block_table))

    def fork(self) -> StageTable:
        """A table over the same tokens, sharing every page that holds any."""
        twin = StageTable(self.pool, self.layers)
        twin.length = self.length
        twin.block_table = [list(block) for block in self.block_table[: self.blocks_for(self.length)]]
        self.pool.share(page for block in twin.block_table for page in block)
        twin._update_pages(0)
        return twin

    def slots(self, tokens: range | None = None) -> Tensor:
        """The pool's slots, int64 [layers, tokens], of some tokens in each layer; by default of all that are held."""
        slots = self.pool.slots_of(self.pages, range(self.length) if tokens is None else tokens)
        return torch.from_numpy(slots).to(self.pool.keys.device)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies of all keys and values of ``layer``, each [length, heads, head_dim]."""
        slots = self.slots()[layer - self.layers.start]
        return self.pool.keys[slots], self.pool.values[slots]

    def _last_block_shared(self) -> bool:
        """Whether the next token falls into a block that others hold, too."""
        place = self.length // self.pool.page_size
        return place < len(self.block_table) and self.pool.shared(self.block_table[place][0])

    def _update_pages(self, first: int) -> None:
        """Bring ``pages`` in line with the blocks, of which those before ``first`` are as they were."""
        # Only what changed: a long sequence would pay for all its blocks with every page that it grows by.
        grown = np.array(self.block_table[first:], np.int64).reshape(-1, len(self.layers)).T
        self.pages = np.concatenate((self.pages[:, :first], grown), axis=1)


class StagedCache:
    """The keys and values of one sequence: a :class:`StageTable` per pruning stage.

    Args:
        pool: where the pages come from.
        starts: first decoder layer of each stage, ascending, the first one 0.
        layers: decoder layers in all.
    """

    def __init__(self, pool: PagePool, starts: Sequence[int], layers: int) -> None:
        ends = (*starts[1:], layers)
        self.pool = pool
        self.stages = [StageTable(pool, range(start, end)) for start, end in zip(starts, ends, strict=True)]
        self.stage_of_layer = [index for index, stage in enumerate(self.stages) for _ in stage.layers]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held, per stage."""
        return tuple(stage.length for stage in self.stages)

    @property
    def bytes_held(self) -> int:
        """Bytes of the pages held, shared ones included."""
        return sum(len(stage.block_table) * len(stage.layers) for stage in self.stages) * self.pool.page_bytes

    @property
    def frees_pages(self) -> bool:
        """Whether giving back the pages held would free any: some are shared with nobody."""
        return any(not self.pool.shared(page) for page in self.owned_pages())

    def reserve(self, tokens: Sequence[int]) -> None:
        """Make room for ``tokens[s]`` more tokens in each stage ``s``; lengths do not change yet.

        Raises:
            PoolExhausted: not enough free pages; nothing changed.
        """
        reserve([self], [tokens])

    def advance(self, tokens: Sequence[int]) -> None:
        """Count ``tokens[s]`` tokens, written into room reserved before, as held."""
        for stage, more in zip(self.stages, tokens, strict=True):
            stage.length += more

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ``lengths[s]`` tokens of each stage and give back the pages they leave empty.

        Raises:
            ValueError: a stage holds fewer.
        """
        for stage, length in zip(self.stages, lengths, strict=True):
            stage.truncate(length)

    def free(self) -> None:
        """Give back every page; the cache is empty and usable afterwards."""
        self.truncate([0] * len(self.stages))

    def fork(self) -> StagedCache:
        """A second cache over the same tokens, sharing all pages until one of the two writes into one."""
        twin = StagedCache(self.pool, [stage.layers.start for stage in self.stages], len(self.stage_of_layer))
        twin.stages = [stage.fork() for stage in self.stages]
        return twin

    def owned_pages(self) -> list[int]:
        """Every page held, in no particular order."""
        return [page for stage in self.stages for block in stage.block_table for page in block]


def reserve(caches: Sequence[StagedCache], tokens: Sequence[Sequence[int]]) -> None:
    """Make room for ``tokens[c][s]`` more tokens in stage ``s`` of each cache ``c``: in all of them, or in none.

    Args:
        caches: all different, all of one pool.
        tokens: per cache and stage.

    Raises:
        PoolExhausted: not enough free pages; nothing changed.
    """
    # Of those who share a block, the last one to write into it keeps it.
    leaving: Counter[int] = Counter()
    stages = [stage for cache in caches for stage in cache.stages]
    counts = [count for each in tokens for count in each]
    wanted = [stage.pages_to_write(more, leaving) for stage, more in zip(stages, counts, strict=True)]
    if not any(wanted):
        return
    pages = iter(caches[0].pool.acquire(sum(wanted)))
    for stage, count in zip(stages, wanted, strict=True):
        stage.make_writable(list(islice(pages, count)))
