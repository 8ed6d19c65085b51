"""A sequence: the log of what was said, and a cache that covers a prefix of it.

The log is the truth and small; the cache can be dropped at any time and is rebuilt from the log by the next
:meth:`vflowopt.runtime.model_runner.Runtime.extend`.
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
    """How far a cache has come through its log.

    Attributes:
        items: whole items cached.
        offset: tokens cached of the item after those; only a picture is ever cached in part.
        position: the logical position at which that item begins.
    """

    items: int = 0
    offset: int = 0
    position: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A state to roll back to. Made by :meth:`Sequence.checkpoint`, good for that sequence alone."""

    items: int
    cached: CachedLength
    lengths: tuple[int, ...]


class Sequence:
    """One sequence's log and cache.

    Args:
        pool: where the cache takes its pages.
        strategy: cuts the decoder into the cache's stages; every picture of the log was compressed by it.
        layers: decoder layers of the model.

    Attributes:
        log: all items said, in order. Append to it only what the model shall read next.
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
        return self.cached.position + sum(map(span, self.log[self.cached.items :]))

    @property
    def pending_tokens(self) -> int:
        """Tokens of the first stage that are said but not cached yet."""
        return sum(map(tokens_in, self.log[self.cached.items :])) - self.cached.offset

    @property
    def pages_wanted(self) -> int:
        """Pages that caching the rest of the log takes at most."""
        tokens = tokens_per_stage(self.log[self.cached.items :], len(self.cache.stages))
        return sum(stage.pages_to_write(more) for stage, more in zip(self.cache.stages, tokens, strict=True))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages held now."""
        return self.cache.bytes_held

    @property
    def kv_bytes_full(self) -> int:
        """Bytes of the pages that an unpruned cache of the cached items would hold."""
        tokens = sum(item.tokens if isinstance(item, CompressedImage) else 1 for item in self.log[: self.cached.items])
        return sum(stage.pages_for(tokens) for stage in self.cache.stages) * self.cache.pool.page_bytes

    @property
    def resident(self) -> bool:
        """Whether any of the log is cached."""
        return self.cached > CachedLength()

    def checkpoint(self) -> Checkpoint:
        """The present state, to come back to by :meth:`rollback`."""
        return Checkpoint(len(self.log), self.cached, self.cache.lengths)

    def rollback(self, checkpoint: Checkpoint) -> None:
        """Forget everything said since ``checkpoint``; pages that become empty are given back.

        Where nothing was cached then, what is cached by now of the same log stays: it was brought back since.
        """
        self.truncate(checkpoint.items)
        # A release since the checkpoint may have left less cached than it had: then there is nothing to cut.
        if self.cached > checkpoint.cached > CachedLength():
            self.cache.truncate(checkpoint.lengths)
            self.cached = checkpoint.cached

    def truncate(self, items: int) -> None:
        """Forget all but the first ``items`` items of the log, and what is cached beyond them."""
        del self.log[items:]
        rest = CachedLength(items, position=sum(map(span, self.log)))
        if self.cached > rest:
            self.cache.truncate(tokens_per_stage(self.log, len(self.cache.stages)))
            self.cached = rest

    def fork(self) -> Sequence:
        """A second sequence with the same past; the two share pages until one of them writes into one."""
        twin = Sequence(self.cache.pool, self.strategy, len(self.cache.stage_of_layer))
        twin.log = list(self.log)
        twin.cache = self.cache.fork()
        twin.cached = self.cached
        return twin

    def share(self, prefix: Sequence) -> None:
        """Take over the cache of ``prefix``, whose log this log begins with; an own cache is given back first."""
        self.cache.free()
        self.cache = prefix.cache.fork()
        self.cached = prefix.cached

    def release(self) -> None:
        """Give back all pages and keep the log: the next extension rebuilds the cache. Idempotent."""
        self.cache.free()
        self.cached = CachedLength()


def span(item: Item) -> int:
    """Logical positions that an item takes."""
    return item.span if isinstance(item, CompressedImage) else 1


def tokens_in(item: Item) -> int:
    """Tokens of the first stage that an item is."""
    return len(item.kept[0]) if isinstance(item, CompressedImage) else 1


def tokens_per_stage(items: abc.Sequence[Item], stages: int) -> list[int]:
    """How many tokens the items put into each stage's cache."""
    text = sum(1 for item in items if isinstance(item, int))
    pictures = [item for item in items if isinstance(item, CompressedImage)]
    return [text + sum(len(picture.kept[stage]) for picture in pictures) for stage in range(stages)]
