"""A folder of offloaded caches: where they go when host memory is full, and when the service stops.

Files are safetensors, and one process at a time uses them. They are written, read and removed, in that order where it
matters, by a thread of its own: the engine's thread never waits for a disk. What cannot be written or read is no
failure, because a cache can be computed again from its sequence's log; it is logged.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import structlog
from safetensors import SafetensorError

from vflow_server.kv.lru import ByteBoundedLRU
from vflow_server.store.files import set_aside
from vflow_server.store.folder_lock import lock_spill
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.offload import OffloadedCache, OffloadError
from vflowopt.runtime.sequence import Sequence

_SCHEMA = 1
"""To be raised when the same numbers in a file come to mean something else: a later release must not go on from what it
would have computed differently."""

_KEPT = re.compile(rf"vflow-kv-v{_SCHEMA}-(?P<session>\w+)-(?P<items>\d+)-(?P<seal>[0-9a-f]{{64}})\.safetensors")
"""What another process may go on from. The name tells all about it, so that nothing is left when the file is gone."""

_OURS = re.compile(r"vflow-kv-(\d+|v\d+-\w+-\d+-[0-9a-f]{64})\.safetensors(\.partial)?")

_MOST_UNWRITTEN = 8
"""Caches that may wait in memory to be written; where the disk is slower than that, further ones are given up."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class _File:
    """A file, its size, how many items of its sequence's log it covers, and its seal.

    The seal is the digest of the file and of these items, once it is written; None if it could not be.
    """

    path: Path
    nbytes: int
    items: int
    seal: Future[str | None]


class DiskStore:
    """Parked caches in files, by sequence. Belongs to the engine's thread.

    Files of other kinds in the folder are left alone.

    Args:
        folder: made if it does not exist; no other process may use it meanwhile.
        most_bytes: tells how many bytes of files there may be, now; beyond, the least recently used go.

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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vflow-spill")

    @property
    def bytes_held(self) -> int:
        """Bytes of the files."""
        return self._files.bytes_held

    def recover(self, owners: Mapping[str, Sequence]) -> list[str]:
        """Take over what an earlier process kept of ``owners``, by session, and remove what else it left behind.

        Args:
            owners: the most recently used last.

        Returns:
            The sessions of which there is something, in that order.
        """
        names = [name for path in self._folder.iterdir() if (name := _KEPT.fullmatch(path.name))]
        kept = {name["session"]: name for name in names}
        found = [session for session in owners if session in kept]
        self._remove_all(but={kept[session].string for session in found})
        for session in found:
            path, seal = self._folder / kept[session].string, Future[str | None]()
            seal.set_result(kept[session]["seal"])
            self._files.put(owners[session], _File(path, path.stat().st_size, int(kept[session]["items"]), seal))
        return found

    def fit(self) -> int:
        """Keep to the bound as it is now, which is returned."""
        most_bytes = self._most_bytes()
        self._files.limit(most_bytes)
        return most_bytes

    def put(self, sequence: Sequence, offloaded: OffloadedCache) -> None:
        """Begin to write a cache of ``sequence``, in the place of an earlier one."""
        self.forget(sequence)
        self._unwritten = [seal for seal in self._unwritten if not seal.done()]
        if offloaded.nbytes > self.fit():
            return
        if len(self._unwritten) >= _MOST_UNWRITTEN:
            log.warning("the disk is too slow for offloaded KV caches, one is given up", bytes=offloaded.nbytes)
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
        """Bytes of the cache of ``sequence``; 0 where there is no file."""
        file = self._files.get(sequence)
        return 0 if file is None else file.nbytes

    def is_written(self, sequence: Sequence, until: float) -> bool:
        """Whether the file of ``sequence`` is written; waits for it, but no longer than ``until``, by the
        monotonic clock."""
        file = self._files.get(sequence)
        if file is None:
            return False
        with suppress(TimeoutError):
            return file.seal.result(max(until - time.monotonic(), 0)) is not None
        return False

    def read(self, sequence: Sequence) -> Future[OffloadedCache]:
        """Begin to read the cache of ``sequence``, which must be held; its file stays.

        The future raises OffloadError where the file is gone, or is not what it should be; then it is set aside.
        """
        file = self._files.get(sequence)
        assert file is not None, "only what is held can be read"
        return self._thread.submit(_read, file, _covered(sequence, file.items))

    def forget(self, sequence: Sequence) -> None:
        """Remove the file of ``sequence``, if there is one."""
        if (file := self._files.pop(sequence)) is not None:
            self._remove(file)

    def close(self, keep: Mapping[str, Sequence]) -> None:
        """Leave what is written of ``keep``, by session, to another process; remove all else, and let it in."""
        self._thread.shutdown(cancel_futures=True)
        try:
            self._remove_all(but={self._name(session, sequence) for session, sequence in keep.items()})
        except OSError as error:
            log.warning("the folder of offloaded KV caches is not as it was", because=str(error))
        self._lock.close()

    def _name(self, session: str, sequence: Sequence) -> str | None:
        """Give the file of ``sequence`` the name by which another process knows what it is; None if there is
        none."""
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
    """The first ``items`` items of a log, and what cut its cache into stages, as bytes to be told apart by."""
    content = [
        [*item.identity, *map(len, item.kept)] if isinstance(item, CompressedImage) else item
        for item in sequence.log[:items]
    ]
    return json.dumps([sequence.strategy.to_json(), content]).encode()


def _write(path: Path, offloaded: OffloadedCache, covered: bytes) -> str | None:
    """Write a file; returns its seal, None if it could not be written."""
    try:
        offloaded.save(path)
        return _seal(path, covered)
    except (OSError, SafetensorError) as error:
        log.warning("an offloaded KV cache could not be written and is given up", file=str(path), because=str(error))
        return None


def _read(file: _File, covered: bytes) -> OffloadedCache:
    # Written before: one thread does both, in the order in which they were asked for.
    try:
        if _seal(file.path, covered) != file.seal.result():
            raise OffloadError(f"{file.path} is not what was written, or not about what was said")
        return OffloadedCache.load(file.path)
    except (OSError, OffloadError) as error:
        with suppress(OSError):  # then it is removed
            set_aside(file.path, error)
        raise OffloadError(str(error)) from error


def _seal(path: Path, covered: bytes) -> str:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(content + covered).hexdigest()
