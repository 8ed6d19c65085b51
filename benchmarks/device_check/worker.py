"""The worker: a process that runs parts, and sends each row as it comes. It may hang, die, or break the device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.device_check.part import Part, Setting

_LINES = 30
"""Lines of a traceback that are sent, from its end."""


class Worker:
    """A process that runs parts, one at a time."""

    def __init__(self) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._ours, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, part: Part, device: str, seconds: float, *, rehearse: bool) -> None:
        """Begin a part, which should end within ``seconds``."""
        self._ours.send((part, device, seconds, rehearse))

    def next(self, seconds: float) -> tuple[str, object] | None:
        """What the worker sends next: ``("row", row)``, ``("done", None)`` or ``("failed", text)``.

        Returns:
            None if nothing came within ``seconds``.
        """
        try:
            if not self._ours.poll(max(seconds, 0)):
                return None
            kind, value = self._ours.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return "failed", f"the process died with exit code {self._process.exitcode}"
        return kind, value

    def close(self) -> None:
        """End the process in good order; nothing may be running."""
        self._ours.close()
        self._process.join(5)
        if self._process.is_alive():
            self.kill()

    def kill(self) -> None:
        """End the process, and all that it started."""
        pid = self._process.pid
        assert pid is not None
        for end in (lambda: os.killpg(pid, signal.SIGKILL), self._process.kill):
            try:
                end()
            except ProcessLookupError:
                pass  # it has ended, or has not come so far as to lead a group
        self._process.join()
        self._ours.close()


def _work(connection: Connection) -> None:
    os.setsid()  # what it starts ends with it
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for folder in ("server", "client"):  # the packages need not be installed
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / folder))
    while True:
        try:
            part, device, seconds, rehearse = connection.recv()
        except EOFError:
            return
        try:
            for row in part.load()(Setting(device, rehearse, time.monotonic() + seconds)):
                connection.send(("row", row))
        except Exception:
            connection.send(("failed", "\n".join(traceback.format_exc().splitlines()[-_LINES:])))
        else:
            connection.send(("done", None))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
