"""The KV cache: one pool of fixed-size pages, and per conversation one block table and length per pruning stage.

Pruning is piecewise constant in depth, so all layers of a stage hold the same tokens and share one length. A page holds
``page_size`` tokens of *one* layer: stages of any depth, cut differently by different strategies, then live in one
pool without fragmenting it. The cache stores physical slots only; positions are the conversation's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    """A preallocated store of KV pages.

    Args:
        budget: bytes that keys and values may take together; rounded down to whole pages.
        page_size: tokens of a page.
        heads: key-value heads of a layer.
        head_dim: channels of a head.
        dtype: type of the stored keys and values.
        device: where they live.

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
            raise ValueError(f"a KV budget of {budget} bytes does not hold one page of {self.page_bytes} bytes")
        # One row per token slot; a page is page_size consecutive rows.
        shape = (self.pages * page_size, heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._free = list(range(self.pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def bytes_total(self) -> int:
        """Bytes of the whole pool."""
        return self.pages * self.page_bytes

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages that are owned."""
        return (self.pages - len(self._free)) * self.page_bytes

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages.

        Raises:
            PoolExhausted: fewer are free; nothing is taken then.
        """
        if count > len(self._free):
            raise PoolExhausted(count, len(self._free), self.pages)
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages that were taken."""
        self._free.extend(pages)

    def check_integrity(self, owners: Iterable[StagedCache]) -> None:
        """Prove that each page is either free or owned by exactly one of ``owners``.

        Raises:
            AssertionError: a page is lost, or owned twice.
        """
        owned = [page for owner in owners for page in owner.owned_pages()]
        seen = sorted(owned + self._free)
        if seen != list(range(self.pages)):
            lost = sorted(set(range(self.pages)) - set(seen))
            twice = sorted({page for page in seen if seen.count(page) > 1}) if len(seen) != len(set(seen)) else []
            raise AssertionError(f"KV pool corrupt: pages lost {lost[:8]}, pages owned twice {twice[:8]}")


class StageTable:
    """The block table and length that the layers of one stage share.

    Attributes:
        layers: the decoder layers of the stage.
        length: tokens held.
        blocks: int64 [layers, blocks], the pages of each layer, in token order.
    """

    def __init__(self, pool: PagePool, layers: range) -> None:
        self.pool = pool
        self.layers = layers
        self.length = 0
        self.blocks = torch.empty(len(layers), 0, dtype=torch.int64)
        # Rows of the pool's tensors, one per token that the pages have room for: [layers, blocks * page_size].
        self._slots = torch.empty(len(layers), 0, dtype=torch.int64, device=pool.keys.device)

    def pages_for(self, length: int) -> int:
        """Pages, over all layers of the stage, that ``length`` tokens take."""
        return -(-length // self.pool.page_size) * len(self.layers)

    def resize(self, pages: Sequence[int], blocks: int) -> list[int]:
        """Append ``pages``, whole blocks, then keep the first ``blocks`` blocks; returns the pages cut off."""
        added = torch.tensor(pages, dtype=torch.int64).reshape(-1, len(self.layers)).T
        table = torch.cat((self.blocks, added), dim=1)
        self.blocks, cut = table[:, :blocks], table[:, blocks:]
        offsets = torch.arange(self.pool.page_size)
        slots = (self.blocks[:, :, None] * self.pool.page_size + offsets).reshape(len(self.layers), -1)
        self._slots = slots.to(self.pool.keys.device)
        return [int(page) for page in cut.flatten()]

    def write(self, layer: int, key: Tensor, value: Tensor, start: int) -> None:
        """Store the keys and values [tokens, heads, head_dim] of ``layer`` from token ``start`` on."""
        slots = self._slots[layer - self.layers.start, start : start + key.shape[0]]
        self.pool.keys.index_copy_(0, slots, key)
        self.pool.values.index_copy_(0, slots, value)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` keys and values of ``layer``, copied together, each [length, heads, head_dim]."""
        slots = self._slots[layer - self.layers.start, :length]
        return self.pool.keys.index_select(0, slots), self.pool.values.index_select(0, slots)


class StagedCache:
    """The keys and values of one conversation: a :class:`StageTable` per pruning stage.

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
        """Bytes of the pages owned."""
        return sum(stage.blocks.numel() for stage in self.stages) * self.pool.page_bytes

    def reserve(self, tokens: Sequence[int]) -> None:
        """Make room for ``tokens[s]`` more tokens in each stage ``s``; lengths do not change yet.

        Raises:
            PoolExhausted: not enough free pages; nothing changed.
        """
        shortages = [
            max(stage.pages_for(stage.length + more) - stage.blocks.numel(), 0)
            for stage, more in zip(self.stages, tokens, strict=True)
        ]
        if not any(shortages):
            return
        pages = self.pool.take(sum(shortages))
        for stage, shortage in zip(self.stages, shortages, strict=True):
            mine, pages = pages[:shortage], pages[shortage:]
            if mine:
                stage.resize(mine, stage.blocks.shape[1] + shortage // len(stage.layers))

    def advance(self, tokens: Sequence[int]) -> None:
        """Count ``tokens[s]`` tokens, written into room reserved before, as held."""
        for stage, more in zip(self.stages, tokens, strict=True):
            stage.length += more

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ``lengths[s]`` tokens of each stage and give back the pages they leave empty."""
        for stage, length in zip(self.stages, lengths, strict=True):
            if length > stage.length:
                raise ValueError(f"cannot truncate a stage of {stage.length} tokens to {length}")
            stage.length = length
            blocks = -(-length // self.pool.page_size)
            if blocks < stage.blocks.shape[1]:
                self.pool.give_back(stage.resize((), blocks))

    def free(self) -> None:
        """Give back every page; the cache is empty and usable afterwards."""
        self.truncate([0] * len(self.stages))

    def owned_pages(self) -> list[int]:
        """Every page owned, in no particular order."""
        return [int(page) for stage in self.stages for page in stage.blocks.flatten()]
