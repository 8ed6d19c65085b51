"""Locks on folders that one process at a time may use."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import ExitStack, suppress
from pathlib import Path

from vflow_server.store.files import make_folder

SESSIONS_LOCK = "sessions.lock"
"""In the data folder."""

KV_LOCK = "vflow.lock"
"""In the folder of offloaded KV caches."""


class FolderLock:
    """A folder that this process alone uses, until :meth:`close`.

    The folder itself is locked, and a file in it: a file can be deleted, and then a second process would lock another
    one of the same name. The file keeps out releases that lock nothing else, and locks where a file system cannot lock
    folders.

    Args:
        folder: made if it does not exist.
        name: the file.
        option: the option that names the folder, for the message.

    Attributes:
        folder: the folder.

    Raises:
        OSError: the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, name: str, option: str) -> None:
        make_folder(folder)
        self.folder = folder
        with ExitStack() as stack:
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, self._descriptor)
            file = stack.enter_context((folder / name).open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock_folder()
            except BlockingIOError as error:
                message = f"another process uses the folder {folder}; give each its own {option}"
                raise OSError(errno.EBUSY, message) from error
            self._held = stack.pop_all()
        self._identity = file_identity(folder)

    def check(self) -> None:
        """Check that the path still leads to the folder that is locked.

        Raises:
            OSError: the folder was deleted, moved or replaced.
        """
        if file_identity(self.folder) != self._identity:
            raise OSError(f"the folder {self.folder} was deleted, moved or replaced; restart the service")

    def close(self) -> None:
        """Unlock the folder."""
        self._held.close()

    def _lock_folder(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            # Some network file systems lock files only. The file is locked by now.
            pass


def file_identity(path: Path) -> tuple[int, int] | None:
    """What tells the file or folder at ``path`` from another one at the same place; None if there is none.

    Raises:
        OSError: that cannot be told.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def lock_data(folder: Path) -> FolderLock:
    """Lock the data folder, which is made where there is none.

    Raises:
        OSError: it cannot be used, or another process uses it.
    """
    return FolderLock(folder, SESSIONS_LOCK, "--data")


def lock_spill(folder: Path) -> FolderLock:
    """Lock the folder of offloaded KV caches, which is made where there is none.

    Raises:
        OSError: it cannot be used, or another process uses it.
    """
    return FolderLock(folder, KV_LOCK, "--spill-dir")
