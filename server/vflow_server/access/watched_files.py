"""A value that is read from files, and read again when they change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

T = TypeVar("T")

LOOK_EVERY = 0.5
"""Seconds between two checks whether the files have changed."""

SETTLE = 0.05
"""Seconds that a change is given to settle: somebody may be replacing a file, or writing it, at the moment."""

Signature = tuple[tuple[int, int, int, int] | None, ...]

log = structlog.get_logger(__name__)


class WatchedFiles(Generic[T]):
    """A value that is read from files. For any thread.

    If the files have changed and ``read_again`` raises an exception, that is logged, the earlier value stays, and the
    next check tries again.

    Args:
        files: the files to watch.
        read: reads the value at first; raises OSError or ValueError if the files are not valid.
        read_again: reads the value when they have changed, also when they are gone; None: ``read`` does.

    Raises:
        OSError, ValueError: the first call of ``read`` raised it.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], T], read_again: Callable[[], T] | None = None) -> None:
        self._files = tuple(files)
        self._reread = read_again or read
        self._lock = threading.Lock()
        self._signature = self._look()
        self._current = read()
        self._looked = time.monotonic()
        self._complaint = ""

    def current(self) -> T:
        """The present value, at most about :data:`LOOK_EVERY` old."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= LOOK_EVERY:
                self._looked = now
                self._read_again()
            return self._current

    def _read_again(self) -> None:
        try:
            if self._look() == self._signature:
                return
            time.sleep(SETTLE)
            signature = self._look()
            read = self._reread()
            if self._look() != signature:  # written to during the read: the next check reads it again
                self._signature = ()
                return
        except (OSError, ValueError) as error:
            self._signature = ()
            if self._complaint != str(error):
                log.error("files that changed cannot be used; their earlier content stays in effect", reason=str(error))
            self._complaint = str(error)
        else:
            self._signature, self._current, self._complaint = signature, read, ""
            log.info("files that changed were read again", files=[str(file) for file in self._files])

    def _look(self) -> Signature:
        return tuple(map(_signature, self._files))


def _signature(file: Path) -> tuple[int, int, int, int] | None:
    """What changes whenever the file does; None if there is no file to be read."""
    try:
        status = file.stat()
    except OSError:
        return None
    # The time of the last change of the inode, too: a copy may keep the time of its original.
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
