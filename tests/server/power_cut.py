"""Power cuts: what a disk holds of a folder when the power goes, by what was flushed to it until then.

The worst case that POSIX allows: of a file there is what it held when it was last flushed, and a folder has the names
that it had when *it* was last flushed. So whatever is acknowledged before it is flushed is lost here, every time.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

_Open = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_void_p
)
_Sync = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class _Methods(ctypes.Structure):
    """SQLite's ``sqlite3_io_methods``: how a file of a file system is used."""

    _fields_ = [
        ("version", ctypes.c_int),
        ("before", ctypes.c_void_p * 4),
        ("sync", ctypes.c_void_p),
        ("behind", ctypes.c_void_p * 12),
    ]


class _FileSystem(ctypes.Structure):
    """SQLite's ``sqlite3_vfs``."""

    _fields_ = [
        ("version", ctypes.c_int),
        ("file_size", ctypes.c_int),
        ("longest_path", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("open", ctypes.c_void_p),
        ("behind", ctypes.c_void_p * 14),
    ]


_HELD: list[object] = []
"""What SQLite has pointers to, for good: a test that fails may leave a database open."""


class Disk:
    """Watches everything below ``root``, which must be empty, while :func:`watched` is entered."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        # By inode. Files stay open, so that no inode is used again for another file; and because closing one would let
        # go of the locks that SQLite holds on it.
        self._contents: dict[int, bytes] = {}
        self._opened: dict[int, FileIO] = {}
        # By inode of a folder: inode by name, and whether it is a folder itself.
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._flushed_folder(root)

    def flushed(self, path: Path) -> None:
        """The file or folder ``path`` was flushed."""
        with self._lock:
            if path.is_dir():
                self._flushed_folder(path)
            elif path.exists():
                self._flushed_file(path)

    def flushed_inode(self, inode: int) -> None:
        """The file or folder with this inode was flushed; nothing happens where it is not below the root."""
        for path in (self._root, *self._root.rglob("*")):
            try:
                if path.stat().st_ino == inode:
                    self.flushed(path)
                    return
            except FileNotFoundError:  # another thread removed it
                continue

    def cut(self, target: Path) -> None:
        """Put into the folder ``target`` what there is of the root once the power comes back."""
        with self._lock:
            self._write(self._root.stat().st_ino, target)

    def _flushed_file(self, path: Path) -> None:
        inode = path.stat().st_ino
        if inode not in self._opened:
            self._opened[inode] = path.open("rb", buffering=0)
        self._opened[inode].seek(0)
        self._contents[inode] = self._opened[inode].read()

    def _flushed_folder(self, path: Path) -> None:
        with os.scandir(path) as entries:
            self._names[path.stat().st_ino] = {each.name: (each.inode(), each.is_dir()) for each in entries}

    def _write(self, inode: int, target: Path) -> None:
        target.mkdir(exist_ok=True)
        for name, (child, is_folder) in self._names.get(inode, {}).items():
            if is_folder:
                self._write(child, target / name)
            else:
                (target / name).write_bytes(self._contents.get(child, b""))


@contextmanager
def watched(root: Path, patch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """The disk below ``root``, as Python and databases that are opened meanwhile flush to it."""
    disk, fsync = Disk(root), os.fsync

    def noted(descriptor: Any) -> None:
        fsync(descriptor)
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        disk.flushed_inode(os.fstat(number).st_ino)

    patch.setattr(os, "fsync", noted)
    with _sqlite_noting(disk.flushed):
        yield disk


@contextmanager
def _sqlite_noting(flushed: Callable[[Path], None]) -> Iterator[None]:
    """Have SQLite use a file system that tells what it flushes; but for that it is the usual one."""
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    if not hasattr(library, "sqlite3_vfs_find"):
        pytest.skip("this Python hides the functions of its SQLite")
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_FileSystem)
    usual = library.sqlite3_vfs_find(None)
    noting = _FileSystem.from_buffer_copy(usual.contents)
    usual_open = _Open(noting.open)

    @_Open
    def opened(system: int, name: int | None, file: Any, flags: int, out_flags: int) -> int:
        # The name stays the pointer that it is: the file system reads it as long as the file is open.
        code: int = usual_open(system, name, file, flags, out_flags)
        if code or not name:
            return code
        methods = _Methods.from_buffer_copy(_Methods.from_address(file[0]))
        sync, path = _Sync(methods.sync), Path(os.fsdecode(ctypes.string_at(name)))

        @_Sync
        def noted(synced: int, how: int) -> int:
            code: int = sync(synced, how)
            flushed(path)
            flushed(path.parent)  # as SQLite does when a journal is new
            return code

        methods.sync = ctypes.cast(noted, ctypes.c_void_p)
        _HELD.extend([methods, noted, sync])
        file[0] = ctypes.addressof(methods)
        return code

    noting.name, noting.open = b"noting", ctypes.cast(opened, ctypes.c_void_p)
    _HELD.extend([library, noting, opened, usual_open])
    library.sqlite3_vfs_register(ctypes.byref(noting), 1)
    try:
        yield
    finally:
        library.sqlite3_vfs_register(usual, 1)
        library.sqlite3_vfs_unregister(ctypes.byref(noting))
