"""Prefixes that sequences have in common: the same tokens and pictures with the same strategy, cached once.

A prefix is a fork of a sequence, made when the last item of its log was a picture. Other sequences of the same tenant
that begin with the same items share its pages. Belongs to the engine's thread.
"""

from __future__ import annotations

from collections import OrderedDict, abc

from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Identity
from vflowopt.runtime.cache import StagedCache
from vflowopt.runtime.sequence import Item, Sequence

_Content = tuple[int | Identity, ...]
_Key = tuple[str, Strategy, _Content]


class PrefixCache:
    """Prefixes by tenant, strategy and content, for one model.

    Args:
        most: number of prefixes to hold; beyond it the least recently used are evicted.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._prefixes: OrderedDict[_Key, Sequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, tenant: str, strategy: Strategy, items: abc.Sequence[Item]) -> Sequence | None:
        """The longest prefix of ``items`` that is cached for ``tenant`` and ``strategy``, or None."""
        content = _content(items)
        for end in range(len(items), 0, -1):
            # Prefixes end with a picture. To look for other ones would hash every prefix of a long text.
            if isinstance(items[end - 1], CompressedImage):
                key = (tenant, strategy, content[:end])
                if (prefix := self._prefixes.get(key)) is not None:
                    self._prefixes.move_to_end(key)
                    return prefix
        return None

    def put(self, tenant: str, sequence: Sequence) -> None:
        """Cache a fork of ``sequence``, which must be fully cached and end with a picture."""
        key = (tenant, sequence.strategy, _content(sequence.log))
        if key not in self._prefixes:
            self._prefixes[key] = sequence.fork()
        self._prefixes.move_to_end(key)
        if len(self._prefixes) > self._most:
            _, oldest = self._prefixes.popitem(last=False)
            oldest.release()

    def release_one(self) -> bool:
        """Evict the least recently used prefix whose release frees pages; returns False if there is none."""
        for key, prefix in self._prefixes.items():
            if prefix.cache.frees_pages:
                del self._prefixes[key]
                prefix.release()
                return True
        return False

    def clear(self) -> None:
        """Evict all prefixes."""
        for prefix in self._prefixes.values():
            prefix.release()
        self._prefixes.clear()

    def caches(self) -> list[StagedCache]:
        """The KV caches of all prefixes, for the integrity check of the pool."""
        return [prefix.cache for prefix in self._prefixes.values()]


def _content(items: abc.Sequence[Item]) -> _Content:
    """Items as a key: token ids, and the identities of pictures."""
    return tuple(item.identity if isinstance(item, CompressedImage) else item for item in items)
