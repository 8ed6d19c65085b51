"""Offloaded KV caches: in host memory, and beyond its bound in files. The least recently used move to files first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future

import structlog

from vflow_server.kv.disk import DiskStore
from vflow_server.kv.lru import ByteBoundedLRU
from vflowopt.runtime.offload import OffloadedCache, OffloadError, Tier
from vflowopt.runtime.sequence import Sequence

log = structlog.get_logger(__name__)


class OffloadStore:
    """Offloaded caches by sequence. Belongs to the engine's thread.

    A file is read before its use, by :meth:`read_ahead` and :meth:`put_read`.

    Args:
        memory_bytes: bytes to hold in host memory; caches beyond that go to files.
        spill: the files; None: caches beyond the bound are dropped, and rebuilt from the log.
    """

    def __init__(self, memory_bytes: int, spill: DiskStore | None) -> None:
        self._spill = spill
        self._memory: ByteBoundedLRU[Sequence, OffloadedCache] = ByteBoundedLRU(
            memory_bytes, lambda offloaded: offloaded.nbytes, dropped=self._spill_out
        )
        self._read: dict[Sequence, OffloadedCache] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes held in host memory."""
        return self._memory.bytes_held

    @property
    def file_bytes(self) -> int:
        """Bytes held in files."""
        return 0 if self._spill is None else self._spill.bytes_held

    def recover(self, owners: Mapping[str, Sequence]) -> list[str]:
        """Take over the files that an earlier process persisted; see :meth:`DiskStore.recover`."""
        return [] if self._spill is None else self._spill.recover(owners)

    def fit(self) -> int:
        """Remove files beyond their present bound; returns the bound in bytes, 0 if there are no files."""
        return 0 if self._spill is None else self._spill.fit()

    def put(self, sequence: Sequence, offloaded: OffloadedCache) -> None:
        """Hold the cache of ``sequence``; it replaces an earlier one."""
        self.forget(sequence)
        self._memory.put(sequence, offloaded)

    def holds(self, sequence: Sequence) -> bool:
        """Whether a cache of ``sequence`` is held anywhere."""
        return self.find(sequence) is not None or self._in_file(sequence)

    def size(self, sequence: Sequence) -> int:
        """Bytes of the cache of ``sequence``; 0 if none is held."""
        if (found := self.find(sequence)) is not None:
            return found[0].nbytes
        return 0 if self._spill is None else self._spill.size(sequence)

    def find(self, sequence: Sequence) -> tuple[OffloadedCache, Tier] | None:
        """The cache of ``sequence`` and its tier, if it is in memory or was read from its file; None otherwise."""
        if (offloaded := self._memory.get(sequence)) is not None:
            return offloaded, Tier.HOST_MEMORY
        if (offloaded := self._read.get(sequence)) is not None:
            return offloaded, Tier.DISK
        return None

    def read_ahead(self, sequence: Sequence) -> Future[OffloadedCache] | None:
        """Start to read the cache of ``sequence`` if only a file holds it; None if there is nothing to read."""
        if self.find(sequence) is not None or self._spill is None or not self._in_file(sequence):
            return None
        return self._spill.read(sequence)

    def put_read(self, sequence: Sequence, reading: Future[OffloadedCache]) -> None:
        """Hold the result of ``reading``, which is done. A file that is damaged or missing is forgotten."""
        try:
            self._read[sequence] = reading.result()
        except OffloadError as error:
            log.warning("an offloaded KV cache is lost and will be rebuilt", because=str(error))
            self.forget(sequence)

    def discard_read(self, sequence: Sequence) -> None:
        """Drop a cache that was read from its file and not used; the file stays."""
        self._read.pop(sequence, None)

    def forget(self, sequence: Sequence) -> None:
        """Drop the cache of ``sequence``, wherever it is held."""
        self._memory.pop(sequence)
        self.discard_read(sequence)
        if self._spill is not None:
            self._spill.forget(sequence)

    def file(self, sequence: Sequence, offloaded: OffloadedCache | None, until: float) -> bool:
        """Write the cache of ``sequence`` to a file, and wait for that.

        Args:
            sequence: the sequence.
            offloaded: its cache; None: the one that is held here.
            until: wait until then at most, by ``time.monotonic()``.

        Returns:
            Whether the cache is in a file.
        """
        if self._spill is None:
            return False
        in_memory = self._memory.pop(sequence)
        if (cache := offloaded or in_memory) is not None and time.monotonic() < until:
            self._spill.put(sequence, cache)
        return self._spill.is_written(sequence, until)

    def close(self, keep: Mapping[str, Sequence]) -> None:
        """Remove the files, except those of ``keep`` (sequences by session); see :meth:`DiskStore.close`."""
        if self._spill is not None:
            self._spill.close(keep)

    def _in_file(self, sequence: Sequence) -> bool:
        return self._spill is not None and self._spill.holds(sequence)

    def _spill_out(self, sequence: Sequence, offloaded: OffloadedCache) -> None:
        if self._spill is not None:
            self._spill.put(sequence, offloaded)
