"""The caches of idle conversations outside the pool: in host memory, then in files, least recently used first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from enum import Enum, auto

import structlog

from vflow_server.kv.disk import SpillFolder
from vflow_server.kv.lru import ByteBoundedLRU
from vflowopt.runtime.offload import ParkedCache, ParkingError
from vflowopt.runtime.sequence import Conversation

log = structlog.get_logger(__name__)


class Tier(Enum):
    """From where a cache comes back, by the names of the contract's ``RestoredFrom``."""

    HOST_MEMORY = auto()
    DISK = auto()
    LOG = auto()


class ParkedStore:
    """Parked caches by conversation. Belongs to the engine's thread.

    A file is read ahead of its use, by :meth:`read_ahead`, which does not wait for it.

    Args:
        memory_bytes: bytes to hold in host memory; what is beyond goes to files.
        spill: the files; None: what is beyond is given up, and rebuilt from the log.
    """

    def __init__(self, memory_bytes: int, spill: SpillFolder | None) -> None:
        self._spill = spill
        self._memory: ByteBoundedLRU[Conversation, ParkedCache] = ByteBoundedLRU(
            memory_bytes, lambda parked: parked.nbytes, dropped=self._spill_out
        )
        self._read: dict[Conversation, ParkedCache] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes held in host memory."""
        return self._memory.bytes_held

    @property
    def file_bytes(self) -> int:
        """Bytes held in files."""
        return 0 if self._spill is None else self._spill.bytes_held

    def recover(self, owners: Mapping[str, Conversation]) -> list[str]:
        """Take over what an earlier process kept; see :meth:`SpillFolder.recover`."""
        return [] if self._spill is None else self._spill.recover(owners)

    def fit(self) -> int:
        """Have the files keep to their bound as it is now, which is returned: bytes."""
        return 0 if self._spill is None else self._spill.fit()

    def put(self, conversation: Conversation, parked: ParkedCache) -> None:
        """Hold the cache of ``conversation``, in the place of an earlier one."""
        self.forget(conversation)
        self._memory.put(conversation, parked)

    def holds(self, conversation: Conversation) -> bool:
        """Whether a cache of ``conversation`` is held anywhere."""
        return self.find(conversation) is not None or self._in_file(conversation)

    def size(self, conversation: Conversation) -> int:
        """Bytes of the cache of ``conversation``; 0 where none is held."""
        if (found := self.find(conversation)) is not None:
            return found[0].nbytes
        return 0 if self._spill is None else self._spill.size(conversation)

    def find(self, conversation: Conversation) -> tuple[ParkedCache, Tier] | None:
        """The cache of ``conversation``, if it is in memory or was read ahead, and where it comes from."""
        if (parked := self._memory.get(conversation)) is not None:
            return parked, Tier.HOST_MEMORY
        if (parked := self._read.get(conversation)) is not None:
            return parked, Tier.DISK
        return None

    def read_ahead(self, conversation: Conversation) -> Future[ParkedCache] | None:
        """Begin to read what is held of ``conversation`` in a file alone; None where there is nothing to read."""
        if self.find(conversation) is not None or self._spill is None or not self._in_file(conversation):
            return None
        return self._spill.read(conversation)

    def has_been_read(self, conversation: Conversation, reading: Future[ParkedCache]) -> None:
        """Take what ``reading``, which is done, has brought; a file that is damaged or gone is forgotten."""
        try:
            self._read[conversation] = reading.result()
        except ParkingError as error:
            log.warning("a parked KV cache is lost and will be rebuilt", because=str(error))
            self.forget(conversation)

    def put_down(self, conversation: Conversation) -> None:
        """Let go of what was read ahead and not used; it still is in its file."""
        self._read.pop(conversation, None)

    def forget(self, conversation: Conversation) -> None:
        """Give up whatever is held of ``conversation``."""
        self._memory.take(conversation)
        self.put_down(conversation)
        if self._spill is not None:
            self._spill.forget(conversation)

    def file(self, conversation: Conversation, parked: ParkedCache | None, until: float) -> bool:
        """Have the cache of ``conversation`` in a file: ``parked``, or what is held.

        It waits for that, but no longer than ``until``, by the monotonic clock.

        Returns:
            Whether there is one.
        """
        if self._spill is None:
            return False
        in_memory = self._memory.take(conversation)
        if (cache := parked or in_memory) is not None and time.monotonic() < until:
            self._spill.put(conversation, cache)
        return self._spill.is_written(conversation, until)

    def close(self, keep: Mapping[str, Conversation]) -> None:
        """Remove the files, but leave those of ``keep``, by session, to the next process; see
        :meth:`SpillFolder.close`."""
        if self._spill is not None:
            self._spill.close(keep)

    def _in_file(self, conversation: Conversation) -> bool:
        return self._spill is not None and self._spill.holds(conversation)

    def _spill_out(self, conversation: Conversation, parked: ParkedCache) -> None:
        if self._spill is not None:
            self._spill.put(conversation, parked)
