"""A folder of offloaded KV caches, for when host memory is full and for when the service stops.

The files are safetensors, and only one process at a time uses the folder. A thread of the store's own writes, reads and
removes them in the order in which this was asked for, so that the engine's thread never waits for a disk. A file that
cannot be written or read is logged and is not an error, because a cache can be computed again from its sequence's log.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import structlog
from safetensors import SafetensorError

from vflow_server.kv.lru import ByteBoundedLRU
from vflow_server.store.folder_lock import lock_spill
from vflow_server.watchdog.pulse import PulsedExecutor
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.offload import OffloadedCache, OffloadError
from vflowopt.runtime.sequence import Sequence

_SCHEMA = 1
"""Must be raised whenever the meaning of the numbers in a file changes: a later release must not continue from a cache
that it would have computed differently."""

_PERSISTED = re.compile(rf"vflow-kv-v{_SCHEMA}-(?P<session>\w+)-(?P<items>\d+)-(?P<seal>[0-9a-f]{{64}})\.safetensors")
"""Files that the next process may take over. All metadata is in the name, so none is left when the file is gone."""

_OURS = re.compile(r"vflow-kv-(\d+|v\d+-\w+-\d+-[0-9a-f]{64})\.safetensors(\.partial)?")

_MOST_UNWRITTEN = 8
"""Caches that may wait in memory to be written. If the disk is too slow, further ones are dropped."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class _File:
    """A file of an offloaded cache.

    Attributes:
        path: where it is.
        nbytes: its size in bytes.
        items: number of items of the sequence's log that it covers.
        seal: digest of the file and of these items, once the file is written; None if it could not be written.
    """

    path: Path
    nbytes: int
    items: int
    seal: Future[str | None]


class DiskStore:
    """Offloaded caches in files, by sequence. Belongs to the engine's thread.

    Other files in the folder are left alone.

    Args:
        folder: made if it does not exist; no other process may use it meanwhile.
        most_bytes: returns the present bound on the bytes of all files. Beyond it the least recently used are removed.

    Attributes:
        pulse: the pulse of the thread; beats once for each file.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: Path, most_bytes: Callable[[], int]) -> None:
        self._lock = lock_spill(folder)
        self._folder = folder
        self._most_bytes = most_bytes
        self._numbers = count()
        self._files: ByteBoundedLRU[Sequence, _File] = ByteBoundedLRU(
            most_bytes(), lambda file: file.nbytes, dropped=lambda _, file: self._remove(file)
        )
        self._unwritten: list[Future[str | None]] = []
        self._thread = PulsedExecutor("vflow-spill")
        self.pulse = self._thread.pulse

    @property
    def bytes_held(self) -> int:
        """Bytes of the files."""
        return self._files.bytes_held

    def recover(self, owners: Mapping[str, Sequence]) -> list[str]:
        """Take over the files that an earlier process persisted, and remove the others that it left.

        Args:
            owners: the sequences by session, the most recently used last.

        Returns:
            The sessions for which there is a file, in the order of ``owners``.
        """
        names = [name for path in self._folder.iterdir() if (name := _PERSISTED.fullmatch(path.name))]
        kept = {name["session"]: name for name in names}
        found = [session for session in owners if session in kept]
        self._remove_all(but={kept[session].string for session in found})
        for session in found:
            path, seal = self._folder / kept[session].string, Future[str | None]()
            seal.set_result(kept[session]["seal"])
            self._files.put(owners[session], _File(path, path.stat().st_size, int(kept[session]["items"]), seal))
        return found

    def fit(self) -> int:
        """Remove files beyond the present bound; returns the bound in bytes."""
        most_bytes = self._most_bytes()
        self._files.limit(most_bytes)
        return most_bytes

    def put(self, sequence: Sequence, offloaded: OffloadedCache) -> None:
        """Start to write the cache of ``sequence``; it replaces an earlier one."""
        self.forget(sequence)
        self._unwritten = [seal for seal in self._unwritten if not seal.done()]
        if offloaded.nbytes > self.fit():
            return
        if len(self._unwritten) >= _MOST_UNWRITTEN:
            log.warning("the disk is too slow for offloaded KV caches, one was dropped", bytes=offloaded.nbytes)
            return
        path = self._folder / f"vflow-kv-{next(self._numbers)}.safetensors"
        items = offloaded.cached.items + bool(offloaded.cached.offset)
        self._unwritten.append(self._thread.submit(_write, path, offloaded, _covered(sequence, items)))
        self._files.put(sequence, _File(path, offloaded.nbytes, items, self._unwritten[-1]))

    def holds(self, sequence: Sequence) -> bool:
        """Whether there is a file for ``sequence``."""
        file = self._files.get(sequence)
        if file is not None and file.seal.done() and file.seal.result() is None:
            self.forget(sequence)
            return False
        return file is not None

    def size(self, sequence: Sequence) -> int:
        """Bytes of the cache of ``sequence``; 0 if there is no file."""
        file = self._files.get(sequence)
        return 0 if file is None else file.nbytes

    def is_written(self, sequence: Sequence, until: float) -> bool:
        """Whether the file of ``sequence`` is written; waits for it until ``until`` (``time.monotonic()``) at most."""
        file = self._files.get(sequence)
        if file is None:
            return False
        with suppress(TimeoutError):
            return file.seal.result(max(until - time.monotonic(), 0)) is not None
        return False

    def read(self, sequence: Sequence) -> Future[OffloadedCache]:
        """Start to read the cache of ``sequence``, which must be held; its file stays.

        The future raises OffloadError if the file is missing or damaged. A damaged file is deleted.
        """
        file = self._files.get(sequence)
        assert file is not None, "only a cache that is held can be read"
        return self._thread.submit(_read, file, _covered(sequence, file.items))

    def forget(self, sequence: Sequence) -> None:
        """Remove the file of ``sequence``, if there is one."""
        if (file := self._files.pop(sequence)) is not None:
            self._remove(file)

    def close(self, keep: Mapping[str, Sequence]) -> None:
        """Leave the files of ``keep`` (sequences by session) to the next process, and remove the others."""
        self._thread.shutdown(cancel_futures=True)
        try:
            self._remove_all(but={self._name(session, sequence) for session, sequence in keep.items()})
        except OSError as error:
            log.warning("the folder of offloaded KV caches could not be cleaned up", because=str(error))
        self._lock.close()

    def _name(self, session: str, sequence: Sequence) -> str | None:
        """Rename the file of ``sequence`` so that the next process can find it; returns the name, None if there is no
        file."""
        file = self._files.get(sequence)
        if file is None or (seal := file.seal.result()) is None:
            return None
        name = f"vflow-kv-v{_SCHEMA}-{session}-{file.items}-{seal}.safetensors"
        file.path.replace(self._folder / name)
        return name

    def _remove(self, file: _File) -> None:
        self._thread.submit(file.path.unlink, missing_ok=True)

    def _remove_all(self, but: Collection[str | None]) -> None:
        for path in self._folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in but:
                path.unlink(missing_ok=True)


def _covered(sequence: Sequence, items: int) -> bytes:
    """The first ``items`` items of a sequence's log and its strategy, as bytes to compute a seal from."""
    content = [
        [*item.identity, *map(len, item.kept)] if isinstance(item, CompressedImage) else item
        for item in sequence.log[:items]
    ]
    return json.dumps([sequence.strategy.to_json(), content]).encode()


def _write(path: Path, offloaded: OffloadedCache, covered: bytes) -> str | None:
    """Write a file; returns its seal, or None if it could not be written."""
    try:
        offloaded.save(path)
        return _seal(path, covered)
    except (OSError, SafetensorError) as error:
        log.warning("an offloaded KV cache could not be written and was dropped", file=str(path), because=str(error))
        return None


def _read(file: _File, covered: bytes) -> OffloadedCache:
    # The file was written before: one thread does both, in the order in which they were submitted.
    try:
        if _seal(file.path, covered) != file.seal.result():
            raise OffloadError(f"{file.path} is not what was written, or belongs to another log")
        return OffloadedCache.load(file.path)
    except (OSError, OffloadError) as error:
        # Not set aside: it can be computed again, and nobody would delete it together with its session.
        log.error("an offloaded KV cache cannot be used and was deleted", file=str(file.path), because=str(error))
        with suppress(OSError):  # otherwise it is removed when the store forgets it
            file.path.unlink(missing_ok=True)
        raise OffloadError(str(error)) from error


def _seal(path: Path, covered: bytes) -> str:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(content + covered).hexdigest()
