"""The log sink: writes lines to a file descriptor from a thread of its own, so that no caller waits and none fails.

Whoever reads the log may stop reading, or die, and the disk may be full. A line that cannot be written is dropped and
counted. Once lines can be written again, the first of them says how many were lost.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from queue import SimpleQueue

from vflow_server.watchdog.pulse import Pulse

MOST_BYTES = 8 * 2**20
"""Bytes of the lines that may wait to be written; further lines are dropped."""


class LogSink:
    """Writes lines in the order in which they come. For any thread; no method raises an exception.

    Args:
        descriptor: file descriptor to write to.
        lost: makes the line that says how many lines were lost.

    Attributes:
        dropped: number of lines that were dropped so far.
        pulse: the pulse of the thread that writes. It always rests: nobody needs to read the log.
    """

    def __init__(self, descriptor: int, lost: Callable[[int], str]) -> None:
        self.dropped = 0
        self.pulse = Pulse()
        self._descriptor = descriptor
        self._lost = lost
        # A simple queue may be entered again by a finalizer that logs while its thread is putting a line.
        self._queue: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        self._lock = threading.RLock()
        self._put_bytes = 0
        self._taken_bytes = 0
        self._reported = 0
        self._rest = b""
        # A daemon: a process may end while nobody reads its log.
        threading.Thread(target=self._run, name="vflow-log", daemon=True).start()

    def put(self, line: str) -> None:
        """Write ``line``, which needs no line end. Returns at once."""
        data = f"{line}\n".encode(errors="backslashreplace")
        with self._lock:
            if self._put_bytes - self._taken_bytes + len(data) > MOST_BYTES:
                self.dropped += 1
                return
            self._put_bytes += len(data)
        self._queue.put(data)

    def drop(self) -> None:
        """Count a line that somebody else dropped."""
        with self._lock:
            self.dropped += 1

    def flush(self, patience: float) -> bool:
        """Wait until the lines so far are written or dropped, at most ``patience`` seconds.

        Returns:
            Whether they are.
        """
        done = threading.Event()
        self._queue.put(done)
        return done.wait(patience)

    def _run(self) -> None:
        self.pulse.begin()
        while True:
            line = self._queue.get()
            try:
                if self.dropped > self._reported:
                    self._report()
                if isinstance(line, bytes):
                    self._write(line)
            except Exception:  # whatever it is, the next line gets its chance
                self.drop()
            if isinstance(line, bytes):
                self._taken_bytes += len(line)
            else:
                line.set()

    def _report(self) -> None:
        dropped = self.dropped
        if self._write(f"{self._lost(dropped - self._reported)}\n".encode(errors="backslashreplace"), counted=False):
            self._reported = dropped

    def _write(self, line: bytes, *, counted: bool = True) -> bool:
        """Write a line, and before it the rest of an earlier one; returns whether it is written, at least in part."""
        left = self._rest + line
        try:
            while left:
                left = left[self._write_some(left) :]
        except OSError:
            begun = len(left) < len(line)
            self._rest = left if begun else left[: len(left) - len(line)]  # the rest may find room later
            if not begun and counted:
                self.drop()
            return begun
        self._rest = b""
        return True

    def _write_some(self, data: bytes) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another process that shares the descriptor may have made it non-blocking
                waiting = select.poll()
                waiting.register(self._descriptor, select.POLLOUT)
                waiting.poll()
