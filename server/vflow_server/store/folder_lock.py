"""Locks on folders that one process at a time may use, held as long as the file that is returned is open."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import TextIO

from vflow_server.store.files import make_folder

SESSIONS_LOCK = "sessions.lock"
"""In the data folder."""

KV_LOCK = "vflow.lock"
"""In the folder of offloaded KV caches."""


def lock_data(folder: Path) -> TextIO:
    """Lock the data folder, which is made where there is none.

    Raises:
        OSError: it cannot be used, or another process uses it.
    """
    return _lock(folder, SESSIONS_LOCK, "--data")


def lock_spill(folder: Path) -> TextIO:
    """Lock the folder of offloaded KV caches, which is made where there is none.

    Raises:
        OSError: it cannot be used, or another process uses it.
    """
    return _lock(folder, KV_LOCK, "--spill-dir")


def _lock(folder: Path, name: str, option: str) -> TextIO:
    make_folder(folder)
    lock = (folder / name).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise OSError(errno.EBUSY, f"another process uses the folder {folder}; give each its own {option}") from error
    return lock
