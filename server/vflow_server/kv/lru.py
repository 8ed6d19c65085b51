"""A least-recently-used cache bounded by bytes, for values that can be computed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteBoundedLRU(Generic[K, V]):
    """Holds values up to a number of bytes; beyond it the least recently used are dropped. Belongs to one thread.

    Args:
        most_bytes: the bound; with 0 nothing is held.
        size: returns the bytes of a value.
        dropped: called with each key and value that is dropped to keep the bound.

    Attributes:
        bytes_held: bytes of the values that are held.
    """

    def __init__(
        self, most_bytes: int, size: Callable[[V], int], dropped: Callable[[K, V], None] = lambda key, value: None
    ) -> None:
        self._most_bytes = most_bytes
        self._size = size
        self._dropped = dropped
        self._values: OrderedDict[K, V] = OrderedDict()
        self.bytes_held = 0

    def get(self, key: K) -> V | None:
        """The value of ``key``, which becomes the most recently used; None if it is not held."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def pop(self, key: K) -> V | None:
        """Remove ``key`` and return its value; None if it is not held."""
        value = self._values.pop(key, None)
        if value is not None:
            self.bytes_held -= self._size(value)
        return value

    def items(self) -> Iterable[tuple[K, V]]:
        """Keys and values, the least recently used first."""
        return self._values.items()

    def put(self, key: K, value: V) -> None:
        """Hold ``value`` in place of an earlier one; a value larger than the bound is dropped at once."""
        if (old := self._values.pop(key, None)) is not None:
            self.bytes_held -= self._size(old)
        if self._size(value) > self._most_bytes:
            self._dropped(key, value)
            return
        self._values[key] = value
        self.bytes_held += self._size(value)
        self.limit(self._most_bytes)

    def limit(self, most_bytes: int) -> None:
        """Set another bound, and drop values beyond it."""
        self._most_bytes = most_bytes
        while self.bytes_held > self._most_bytes:
            oldest, dropped = self._values.popitem(last=False)
            self.bytes_held -= self._size(dropped)
            self._dropped(oldest, dropped)
