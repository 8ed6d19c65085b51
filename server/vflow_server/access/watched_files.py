"""Something that was read from files, and is read again when they change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

T = TypeVar("T")

LOOK_EVERY = 1.0
"""Seconds between two looks at whether the files have changed."""

Signature = tuple[tuple[int, int, int], ...]

log = structlog.get_logger(__name__)


class WatchedFiles(Generic[T]):
    """What some files say. May be asked from any thread.

    Files that cannot be read any more, or say something invalid, change nothing but the log: whoever replaces them may
    be in the middle of it, and what they said before goes on to hold.

    Args:
        files: what to look at.
        read: reads them; raises OSError or ValueError where they are not as they must be.

    Raises:
        OSError, ValueError: what ``read`` raised the first time.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], T]) -> None:
        self._files = tuple(files)
        self._read = read
        self._lock = threading.Lock()
        self._signature = self._look()
        self._current = read()
        self._looked = time.monotonic()

    def current(self) -> T:
        """What they say now, or said within the last second."""
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
            if self._look() != signature:  # written to while it was read: the next look takes it
                self._signature = ()
                return
        except (OSError, ValueError) as error:
            log.error("files that changed cannot be used; what they said before holds", reason=str(error))
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
