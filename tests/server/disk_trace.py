"""A disk of which every change is recorded, so that it can be cut off at any of them; and one on which calls fail.

What Python and SQLite ask of the operating system is recorded where they ask for it: a layer in this process, around
``os`` and SQLite's file system, not a file system of its own. It sees every write of the journal and every file that is
flushed; what is written to a file before that counts as one write at the flush.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.server.power_cut import _FileSystem, _Methods, _Open, _Sync

_Write = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_Truncate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
_Delete = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)

_SECTOR = 512
_HELD: list[object] = []
"""What SQLite has pointers to, for good."""


@dataclass(frozen=True)
class Write:
    """Bytes that were written to a file."""

    file: int
    offset: int
    content: bytes


@dataclass(frozen=True)
class Cut:
    """A file that was cut off, or made anew: then it is empty."""

    file: int
    size: int


@dataclass(frozen=True)
class Named:
    """A name that was given to a file, or taken away; another name may have been taken away with it."""

    name: str
    file: int | None
    before: str | None = None


@dataclass(frozen=True)
class Flushed:
    """A file, or a folder and its names, that were flushed."""

    file: int | None = None
    folder: str | None = None


Change = Write | Cut | Named | Flushed


@dataclass
class Trace:
    """The changes below ``root``, in order.

    Attributes:
        root: the folder; it must be empty at first, and its subfolders count as being on the disk once they are made.
        changes: what was recorded.
        fail: called before each change; returns the errno to fail with, or 0.
    """

    root: Path
    changes: list[Change] = field(default_factory=list)
    fail: Callable[[str], int] = lambda what: 0
    _inodes: dict[str, int] = field(default_factory=dict)
    _count: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def inside(self, path: object) -> str | None:
        """The path from the root; None if it is elsewhere."""
        if not isinstance(path, str | os.PathLike):
            return None
        whole, root = os.path.abspath(os.fspath(path)), str(self.root)
        return os.path.relpath(whole, root) if isinstance(whole, str) and whole.startswith(root + os.sep) else None

    def made(self, name: str, *, emptied: bool = False) -> int:
        """The number of the file ``name``, which may be new."""
        with self._lock:
            if name not in self._inodes:
                self._count += 1
                self._inodes[name] = self._count
                self.changes.append(Named(name, self._count))
            elif emptied:
                self.changes.append(Cut(self._inodes[name], 0))
            return self._inodes[name]

    def renamed(self, old: str, new: str) -> None:
        with self._lock:
            self._inodes[new] = self._inodes.pop(old)
            self.changes.append(Named(new, self._inodes[new], old))

    def removed(self, name: str) -> None:
        with self._lock:
            if self._inodes.pop(name, None) is not None:
                self.changes.append(Named(name, None))

    def note(self, change: Change) -> None:
        with self._lock:
            self.changes.append(change)

    def name_of(self, descriptor: int) -> str | None:
        return self.inside(os.readlink(f"/proc/self/fd/{descriptor}"))


def after_a_cut(changes: list[Change], chance: random.Random | None, *, names: float = 0.5) -> dict[str, bytes]:
    """The files of a disk that was cut off after ``changes``.

    Args:
        changes: what had been asked for.
        chance: decides which changes that were not flushed are on the disk; None: none of them.
        names: how likely a name is that was not flushed.

    Returns:
        Contents by name.
    """
    contents: dict[int, bytearray] = {}
    waiting: dict[int, list[Write | Cut]] = {}
    listed: dict[str, int] = {}
    unlisted: list[Named] = []
    for change in changes:
        if isinstance(change, Write | Cut):
            waiting.setdefault(change.file, []).append(change)
        elif isinstance(change, Named):
            unlisted.append(change)
        elif change.file is not None:
            for write in waiting.pop(change.file, []):
                _apply(contents, write)
        else:
            later = []
            for named in unlisted:
                if change.folder in (os.path.dirname(named.name), os.path.dirname(named.before or named.name)):
                    _list(listed, named)
                else:
                    later.append(named)
            unlisted = later
    if chance is not None:
        for named in unlisted:
            if chance.random() < names:
                _list(listed, named)
        for writes in waiting.values():
            for write in writes:
                if isinstance(write, Cut):
                    if chance.random() < 0.5:
                        _apply(contents, write)
                    continue
                whole = chance.random()
                for start in range(0, len(write.content), _SECTOR):
                    if whole < 0.4 or (whole < 0.8 and chance.random() < 0.5):
                        sector = write.content[start : start + _SECTOR]
                        _apply(contents, Write(write.file, write.offset + start, sector))
    return {name: bytes(contents.get(file, b"")) for name, file in listed.items()}


def _apply(contents: dict[int, bytearray], change: Write | Cut) -> None:
    content = contents.setdefault(change.file, bytearray())
    if isinstance(change, Cut):
        content[change.size :] = b""
        return
    content.extend(bytes(max(0, change.offset - len(content))))
    content[change.offset : change.offset + len(change.content)] = change.content


def _list(listed: dict[str, int], named: Named) -> None:
    if named.before is not None and listed.get(named.before) == named.file:
        del listed[named.before]
    if named.file is None:
        listed.pop(named.name, None)
    else:
        listed[named.name] = named.file


@contextmanager
def traced(root: Path, patch: pytest.MonkeyPatch) -> Iterator[Trace]:
    """Record what Python and databases that are opened meanwhile do below ``root``."""
    trace = Trace(root)
    usual_open, usual_fsync, usual_unlink = os.open, os.fsync, os.unlink

    def check(what: str) -> None:
        if code := trace.fail(what):
            raise OSError(code, os.strerror(code))

    def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        name = trace.inside(path)
        if name is not None and flags & os.O_CREAT:
            check("open")
        descriptor = usual_open(path, flags, *arguments, **options)
        if name is not None and flags & os.O_CREAT:
            trace.made(name, emptied=bool(flags & os.O_TRUNC))
        return descriptor

    def flushed(descriptor: int) -> None:
        name = trace.name_of(descriptor)
        if name is None:
            if os.readlink(f"/proc/self/fd/{descriptor}") == str(root):
                check("fsync")
                trace.note(Flushed(folder=""))
            usual_fsync(descriptor)
            return
        check("fsync")
        path = trace.root / name
        if path.is_dir():
            trace.note(Flushed(folder=name))
        else:
            file = trace.made(name)
            trace.note(Cut(file, 0))
            trace.note(Write(file, 0, path.read_bytes()))
            trace.note(Flushed(file))

    def moved(usual: Callable[..., None]) -> Callable[..., None]:
        def move(old: Any, new: Any, **options: Any) -> None:
            names = trace.inside(old), trace.inside(new)
            if None not in names:
                check("rename")
            usual(old, new, **options)
            if names[0] is not None and names[1] is not None:
                trace.renamed(names[0], names[1])

        return move

    def removed(path: Any, **options: Any) -> None:
        if (name := trace.inside(path)) is not None:
            check("unlink")
        usual_unlink(path, **options)
        if name is not None:
            trace.removed(name)

    with patch.context() as patched:
        patched.setattr(os, "open", opened)
        patched.setattr(os, "fsync", flushed)
        patched.setattr(os, "unlink", removed)
        patched.setattr(os, "rename", moved(os.rename))
        patched.setattr(os, "replace", moved(os.replace))
        with _sqlite_traced(trace):
            yield trace


@contextmanager
def _sqlite_traced(trace: Trace) -> Iterator[None]:
    """Have SQLite use a file system that records what it is asked for; but for that it is the usual one."""
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    if not hasattr(library, "sqlite3_vfs_find"):
        pytest.skip("this Python hides the functions of its SQLite")
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_FileSystem)
    usual = library.sqlite3_vfs_find(None)
    tracing = _FileSystem.from_buffer_copy(usual.contents)
    usual_open, usual_delete = _Open(tracing.open), _Delete(tracing.behind[0])

    @_Open
    def opened(system: int, name: int | None, file: Any, flags: int, out_flags: int) -> int:
        code: int = usual_open(system, name, file, flags, out_flags)
        inner = trace.inside(os.fsdecode(ctypes.string_at(name))) if name else None
        if code or inner is None:
            return code
        new = inner not in trace._inodes and inner.endswith(("-wal", "-journal"))
        number, methods = trace.made(inner), _Methods.from_buffer_copy(_Methods.from_address(file[0]))
        write, truncate, sync = _Write(methods.before[2]), _Truncate(methods.before[3]), _Sync(methods.sync)
        folder = os.path.dirname(inner)

        @_Write
        def written(handle: int, content: int, amount: int, offset: int) -> int:
            if trace.fail("write"):
                return int(sqlite3.SQLITE_FULL)
            code: int = write(handle, content, amount, offset)
            trace.note(Write(number, offset, ctypes.string_at(content, amount)))
            return code

        @_Truncate
        def truncated(handle: int, size: int) -> int:
            if trace.fail("truncate"):
                return int(sqlite3.SQLITE_IOERR_TRUNCATE)
            code: int = truncate(handle, size)
            trace.note(Cut(number, size))
            return code

        @_Sync
        def synced(handle: int, how: int) -> int:
            if trace.fail("sync"):
                return int(sqlite3.SQLITE_IOERR_FSYNC)
            nonlocal new
            trace.note(Flushed(number))
            if new:  # then SQLite flushes the folder as well
                trace.note(Flushed(folder=folder))
                new = False
            return 0

        methods.before[2] = ctypes.cast(written, ctypes.c_void_p).value
        methods.before[3] = ctypes.cast(truncated, ctypes.c_void_p).value
        methods.sync = ctypes.cast(synced, ctypes.c_void_p)
        _HELD.extend([methods, written, truncated, synced, write, truncate, sync])
        file[0] = ctypes.addressof(methods)
        return code

    @_Delete
    def deleted(system: int, name: int, flush: int) -> int:
        code: int = usual_delete(system, name, flush)
        if (inner := trace.inside(os.fsdecode(ctypes.string_at(name)))) is not None and not code:
            trace.removed(inner)
        return code

    tracing.name, tracing.open = b"tracing", ctypes.cast(opened, ctypes.c_void_p)
    tracing.behind[0] = ctypes.cast(deleted, ctypes.c_void_p).value
    _HELD.extend([library, tracing, opened, deleted, usual_open, usual_delete])
    library.sqlite3_vfs_register(ctypes.byref(tracing), 1)
    try:
        yield
    finally:
        library.sqlite3_vfs_register(usual, 1)
        library.sqlite3_vfs_unregister(ctypes.byref(tracing))
