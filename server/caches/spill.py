"""A folder of parked caches: where they go when host memory is full.

Files are safetensors, and only this process reads them. They are written, read and removed, in that order where it
matters, by a thread of its own: the engine's thread never waits for a disk. What cannot be written or read is no
failure, because a cache can be computed again from its conversation's log; it is logged.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import structlog
from safetensors import SafetensorError

from vflow_server.caches.lru import ByteBoundedLRU
from vflowopt.conversation import Conversation
from vflowopt.parking import ParkedCache, ParkingError

LOCK = "vflow.lock"
"""Held while a process uses the folder."""

_OURS = re.compile(r"vflow-kv-\d+\.safetensors(\.partial)?")

_MOST_UNWRITTEN = 8
"""Caches that may wait in memory to be written; where the disk is slower than that, further ones are given up."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class _File:
    """A file, its size, and its digest once it is written; None if it could not be."""

    path: Path
    nbytes: int
    digest: Future[bytes | None]


class SpillFolder:
    """Parked caches in files, by conversation. Belongs to the engine's thread.

    What a process left behind that ended without :meth:`close` is removed; files of other kinds are left alone.

    Args:
        folder: made if it does not exist; no other process may use it meanwhile.
        most_bytes: bytes of the files at most; beyond, the least recently used go.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._lock = (folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise OSError(f"another process uses the folder {folder}; give each its own --spill-dir") from error
        self._remove_all()
        self._most_bytes = most_bytes
        self._numbers = count()
        self._files: ByteBoundedLRU[Conversation, _File] = ByteBoundedLRU(
            most_bytes, lambda file: file.nbytes, dropped=lambda _, file: self._remove(file)
        )
        self._unwritten: list[Future[bytes | None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vflow-spill")

    @property
    def bytes_held(self) -> int:
        """Bytes of the files."""
        return self._files.bytes_held

    def put(self, conversation: Conversation, parked: ParkedCache) -> None:
        """Begin to write a cache of ``conversation``, in the place of an earlier one."""
        self.forget(conversation)
        self._unwritten = [digest for digest in self._unwritten if not digest.done()]
        if parked.nbytes > self._most_bytes:
            return
        if len(self._unwritten) >= _MOST_UNWRITTEN:
            log.warning("the disk is too slow for parked KV caches, one is given up", bytes=parked.nbytes)
            return
        path = self._folder / f"vflow-kv-{next(self._numbers)}.safetensors"
        self._unwritten.append(self._thread.submit(_write, path, parked))
        self._files.put(conversation, _File(path, parked.nbytes, self._unwritten[-1]))

    def holds(self, conversation: Conversation) -> bool:
        """Whether there is a file for ``conversation``."""
        file = self._files.get(conversation)
        if file is not None and file.digest.done() and file.digest.result() is None:
            self.forget(conversation)
            return False
        return file is not None

    def read(self, conversation: Conversation) -> Future[ParkedCache]:
        """Begin to read the cache of ``conversation``, which must be held; its file stays.

        The future raises ParkingError where the file is damaged or gone.
        """
        file = self._files.get(conversation)
        assert file is not None, "only what is held can be read"
        return self._thread.submit(_read, file)

    def forget(self, conversation: Conversation) -> None:
        """Remove the file of ``conversation``, if there is one."""
        if (file := self._files.take(conversation)) is not None:
            self._remove(file)

    def close(self) -> None:
        """Remove all files and let others use the folder."""
        self._thread.shutdown(cancel_futures=True)
        self._remove_all()
        self._lock.close()

    def _remove(self, file: _File) -> None:
        self._thread.submit(file.path.unlink, missing_ok=True)

    def _remove_all(self) -> None:
        for path in self._folder.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)


def _write(path: Path, parked: ParkedCache) -> bytes | None:
    """Write a file; returns its digest, None if it could not be written."""
    try:
        parked.save(path)
        return _digest(path)
    except (OSError, SafetensorError) as error:
        log.warning("a parked KV cache could not be written and is given up", file=str(path), because=str(error))
        return None


def _read(file: _File) -> ParkedCache:
    # Written before: one thread does both, in the order in which they were asked for.
    try:
        if _digest(file.path) != file.digest.result():
            raise ParkingError(f"{file.path} is not as it was written")
    except OSError as error:
        raise ParkingError(f"{file.path} cannot be read: {error}") from error
    return ParkedCache.load(file.path)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
