"""Beginnings that sequences have in common: the same tokens and pictures under the same strategy, cached once.

A prefix is a frozen fork of a sequence at the moment when its last item was a picture. Whoever of the same tenant
begins the same way shares its pages. Belongs to the engine's thread.
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
        most: prefixes held; the least recently used go first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._prefixes: OrderedDict[_Key, Sequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, tenant: str, strategy: Strategy, items: abc.Sequence[Item]) -> Sequence | None:
        """The longest prefix of ``items`` that is held for ``tenant``, or None."""
        content = _content(items)
        for end in range(len(items), 0, -1):
            # Only pictures end prefixes: looking for others would hash every beginning of a long text.
            if isinstance(items[end - 1], CompressedImage):
                key = (tenant, strategy, content[:end])
                if (prefix := self._prefixes.get(key)) is not None:
                    self._prefixes.move_to_end(key)
                    return prefix
        return None

    def put(self, tenant: str, sequence: Sequence) -> None:
        """Hold the present state of ``sequence`` of ``tenant``, all of it cached and its last item a picture."""
        key = (tenant, sequence.strategy, _content(sequence.log))
        if key not in self._prefixes:
            self._prefixes[key] = sequence.fork()
        self._prefixes.move_to_end(key)
        if len(self._prefixes) > self._most:
            _, oldest = self._prefixes.popitem(last=False)
            oldest.release()

    def release_one(self) -> bool:
        """Free pages: give up the least recently used prefix that holds some alone; False when there is none."""
        for key, prefix in self._prefixes.items():
            if prefix.cache.frees_pages:
                del self._prefixes[key]
                prefix.release()
                return True
        return False

    def clear(self) -> None:
        """Give up all prefixes."""
        for prefix in self._prefixes.values():
            prefix.release()
        self._prefixes.clear()

    def caches(self) -> list[StagedCache]:
        """The caches held, for the proof of the pool's integrity."""
        return [prefix.cache for prefix in self._prefixes.values()]


def _content(items: abc.Sequence[Item]) -> _Content:
    """What items say, whoever says it: token ids, and pictures by what they are called in caches."""
    return tuple(item.identity if isinstance(item, CompressedImage) else item for item in items)
