"""A conversation: the log of what was said, and a cache that covers a prefix of it.

The log is the truth and small; the cache can be dropped at any time and is rebuilt from the log by the next
:meth:`vflowopt.runtime.Runtime.extend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vflowopt.cache import PagePool, StagedCache
from vflowopt.compression import CompressedImage
from vflowopt.strategy import Strategy

Item = int | CompressedImage
"""What a log is made of: a token id, or a compressed picture."""


@dataclass(frozen=True)
class Checkpoint:
    """A state to roll back to. Made by :meth:`Conversation.checkpoint`, good for that conversation alone."""

    items: int
    cached_items: int
    cached_position: int
    lengths: tuple[int, ...]


class Conversation:
    """One conversation's log and cache.

    Args:
        pool: where the cache takes its pages.
        strategy: cuts the decoder into the cache's stages; every picture of the log was compressed by it.
        layers: decoder layers of the model.

    Attributes:
        log: all items said, in order. Append to it only what the model shall read next.
        cached_items: how many of the first items the cache covers.
        cached_position: the logical position after those items.
    """

    def __init__(self, pool: PagePool, strategy: Strategy, layers: int) -> None:
        self.strategy = strategy
        self.log: list[Item] = []
        self.cache = StagedCache(pool, strategy.starts, layers)
        self.cached_items = 0
        self.cached_position = 0

    @property
    def position(self) -> int:
        """The logical position of the next item."""
        return self.cached_position + sum(map(span, self.log[self.cached_items :]))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages held now."""
        return self.cache.bytes_held

    @property
    def kv_bytes_full(self) -> int:
        """Bytes of the pages that an unpruned cache of the cached items would hold."""
        tokens = sum(item.tokens if isinstance(item, CompressedImage) else 1 for item in self.log[: self.cached_items])
        return sum(stage.pages_for(tokens) for stage in self.cache.stages) * self.cache.pool.page_bytes

    @property
    def resident(self) -> bool:
        """Whether any of the log is cached."""
        return self.cached_items > 0

    def checkpoint(self) -> Checkpoint:
        """The present state, to come back to by :meth:`rollback`."""
        return Checkpoint(len(self.log), self.cached_items, self.cached_position, self.cache.lengths)

    def rollback(self, checkpoint: Checkpoint) -> None:
        """Forget everything said since ``checkpoint``; pages that become empty are given back."""
        del self.log[checkpoint.items :]
        # A release since the checkpoint may have left less cached than it had: then there is nothing to cut.
        if self.cached_items > checkpoint.cached_items:
            self.cache.truncate(checkpoint.lengths)
            self.cached_items = checkpoint.cached_items
            self.cached_position = checkpoint.cached_position

    def release(self) -> None:
        """Give back all pages and keep the log: the next extension rebuilds the cache. Idempotent."""
        self.cache.free()
        self.cached_items = 0
        self.cached_position = 0


def span(item: Item) -> int:
    """Logical positions that an item takes."""
    return item.span if isinstance(item, CompressedImage) else 1


def tokens_per_stage(items: Sequence[Item], stages: int) -> list[int]:
    """How many tokens the items put into each stage's cache."""
    text = sum(1 for item in items if isinstance(item, int))
    pictures = [item for item in items if isinstance(item, CompressedImage)]
    return [text + sum(len(picture.kept[stage]) for picture in pictures) for stage in range(stages)]
