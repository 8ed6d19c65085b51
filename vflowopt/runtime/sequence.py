"""A sequence: a log of tokens and pictures, and a KV cache that covers a prefix of it.

The log is small, and enough to rebuild the cache. So the cache can be dropped at any time: the next
:meth:`vflowopt.runtime.model_runner.Runtime.extend` computes it again.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.cache import PagePool, StagedCache

Item = int | CompressedImage
"""What a log is made of: a token id, or a compressed picture."""


@dataclass(frozen=True, order=True)
class CachedLength:
    """How much of a log is cached.

    Attributes:
        items: number of items cached whole.
        offset: first-stage tokens cached of the item after those; only a picture can be cached in part.
        position: the logical position at which that item begins.
    """

    items: int = 0
    offset: int = 0
    position: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A state to roll back to. Made by :meth:`Sequence.checkpoint`, valid for that sequence alone."""

    items: int
    cached: CachedLength
    lengths: tuple[int, ...]


class Sequence:
    """A log and its KV cache.

    Args:
        pool: where the cache's pages come from.
        strategy: divides the decoder into the cache's stages; every picture of the log must be compressed by it.
        layers: number of decoder layers.

    Attributes:
        strategy: as given.
        log: all items, in order. Append what the model is to read next; change nothing else.
        cache: the keys and values.
        cached: how much of the log the cache covers.
    """

    def __init__(self, pool: PagePool, strategy: Strategy, layers: int) -> None:
        self.strategy = strategy
        self.log: list[Item] = []
        self.cache = StagedCache(pool, strategy.starts, layers)
        self.cached = CachedLength()

    @property
    def num_cached_items(self) -> int:
        """Whole items that the cache covers."""
        return self.cached.items

    @property
    def position(self) -> int:
        """The logical position of the next item."""
        rest = self.log[self.cached.items :]
        return self.cached.position + len(rest) + sum(image.span - 1 for image in pictures_in(rest))

    @property
    def pending_tokens(self) -> int:
        """First-stage tokens of the log that are not cached yet."""
        rest = self.log[self.cached.items :]
        return len(rest) + sum(len(image.kept[0]) - 1 for image in pictures_in(rest)) - self.cached.offset

    @property
    def pages_wanted(self) -> int:
        """The most pages that caching the rest of the log takes."""
        tokens = tokens_per_stage(self.log[self.cached.items :], len(self.cache.stages))
        return sum(stage.pages_to_write(more) for stage, more in zip(self.cache.stages, tokens, strict=True))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache's pages, shared ones included."""
        return self.cache.bytes_held

    @property
    def kv_bytes_full(self) -> int:
        """Bytes of the pages that the cached items would take without pruning."""
        cached = self.log[: self.cached.items]
        tokens = len(cached) + sum(image.tokens - 1 for image in pictures_in(cached))
        return sum(stage.pages_for(tokens) for stage in self.cache.stages) * self.cache.pool.page_bytes

    @property
    def resident(self) -> bool:
        """Whether any of the log is cached."""
        return self.cached > CachedLength()

    def checkpoint(self) -> Checkpoint:
        """The present state, for :meth:`rollback`."""
        return Checkpoint(len(self.log), self.cached, self.cache.lengths)

    def rollback(self, checkpoint: Checkpoint) -> None:
        """Drop everything appended to the log since ``checkpoint``, and release pages that become empty.

        If nothing was cached at the checkpoint, what is cached now of the remaining log stays: it was restored since.
        """
        self.truncate(checkpoint.items)
        # A release since the checkpoint may have left less cached than then: there is nothing to drop.
        if self.cached > checkpoint.cached > CachedLength():
            self.cache.truncate(checkpoint.lengths)
            self.cached = checkpoint.cached

    def truncate(self, items: int) -> None:
        """Drop all but the first ``items`` items of the log, and what is cached after them."""
        del self.log[items:]
        rest = CachedLength(items, position=sum(map(span, self.log)))
        if self.cached > rest:
            self.cache.truncate(tokens_per_stage(self.log, len(self.cache.stages)))
            self.cached = rest

    def fork(self) -> Sequence:
        """A second sequence with the same log; a page is shared until one of the two writes to it."""
        twin = Sequence(self.cache.pool, self.strategy, len(self.cache.stage_of_layer))
        twin.log = list(self.log)
        twin.cache = self.cache.fork()
        twin.cached = self.cached
        return twin

    def share(self, prefix: Sequence) -> None:
        """Replace the cache by a fork of that of ``prefix``, whose log must be a prefix of this log."""
        self.cache.free()
        self.cache = prefix.cache.fork()
        self.cached = prefix.cached

    def release(self) -> None:
        """Release all pages and keep the log: the next run rebuilds the cache. Idempotent."""
        self.cache.free()
        self.cached = CachedLength()


def span(item: Item) -> int:
    """The number of logical positions of an item."""
    return item.span if isinstance(item, CompressedImage) else 1


def tokens_in(item: Item) -> int:
    """The number of first-stage tokens of an item."""
    return len(item.kept[0]) if isinstance(item, CompressedImage) else 1


def pictures_in(items: abc.Sequence[Item]) -> list[CompressedImage]:
    """The pictures among items. Logs are long and mostly text: counting goes by these."""
    return [item for item in items if not isinstance(item, int)]


def tokens_per_stage(items: abc.Sequence[Item], stages: int) -> list[int]:
    """How many tokens the items add to the cache of each stage."""
    pictures = pictures_in(items)
    text = len(items) - len(pictures)
    return [text + sum(len(picture.kept[stage]) for picture in pictures) for stage in range(stages)]
