"""A value that is read from files, and read again when they change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

T = TypeVar("T")

LOOK_EVERY = 1.0
"""Seconds between two checks whether the files have changed."""

Signature = tuple[tuple[int, int, int], ...]

log = structlog.get_logger(__name__)


class WatchedFiles(Generic[T]):
    """A value that is read from files. For any thread.

    If changed files are missing or not valid, an error is logged and the earlier value stays: somebody may be replacing
    them at the moment.

    Args:
        files: the files to watch.
        read: reads the value; raises OSError or ValueError if the files are not valid.

    Raises:
        OSError, ValueError: the first call of ``read`` raised it, or a file is missing.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], T]) -> None:
        self._files = tuple(files)
        self._read = read
        self._lock = threading.Lock()
        self._signature = self._look()
        self._current = read()
        self._looked = time.monotonic()

    def current(self) -> T:
        """The present value, at most about a second old."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= LOOK_EVERY:
                self._looked = now
                self._read_again()
            return self._current

    def _read_again(self) -> None:
        try:
            if (signature := self._look()) == self._signature:
                return
            self._signature = signature
            read = self._read()
            if self._look() != signature:  # written to during the read: the next check reads it again
                self._signature = ()
                return
        except (OSError, ValueError) as error:
            log.error("files that changed cannot be used; their earlier content stays in effect", reason=str(error))
        else:
            self._current = read
            log.info("files that changed were read again", files=[str(file) for file in self._files])

    def _look(self) -> Signature:
        return tuple(map(_signature, self._files))


def _signature(file: Path) -> tuple[int, int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror}") from None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
