"""A service process that is killed and started again, many times: so what takes seconds to import is imported once."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vflow_client import Client, RetryPolicy, connect

_FORKING = """
import json, os, sys
import vflow_server.app
from vflow_server.cli import main

for line in sys.stdin:
    log, *arguments = json.loads(line)
    if not (process := os.fork()):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os._exit(main(arguments))
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
"""Serves in a process of its own, again and again; each begins as a copy of this one, which does nothing itself."""


class Mortal:
    """A service with the given flags; it is up when this returns, and again after :meth:`start`.

    Args:
        log: file that all its lives write their log to.
    """

    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
        self._arguments = ["serve", "--port", "0", "--threads", "1", "--log-format", "json", *flags]
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._up = threading.Event()
        self.start()

    def start(self) -> None:
        """Live again."""
        assert self._parent.stdin is not None
        print(json.dumps([str(self._log), *self._arguments]), file=self._parent.stdin, flush=True)
        self._process = int(self._line())
        ready = self._line()
        assert ready.startswith("VFlow is ready on "), self._log.read_text()
        self._address = ready.split()[-1]
        self._up.set()

    def kill(self) -> None:
        """Die at once."""
        self.signal(signal.SIGKILL)
        assert self.ended() == -signal.SIGKILL

    def signal(self, number: int) -> None:
        """Send a signal."""
        self._up.clear()
        os.kill(self._process, number)

    def ended(self) -> int:
        """The exit code, once it has ended."""
        return int(self._line())

    def logged(self) -> list[dict[str, object]]:
        """What was logged in all lives."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def close(self) -> None:
        """Start no more; what lives is killed."""
        if self._up.is_set():
            self.kill()
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()

    @contextmanager
    def client(self, retry: RetryPolicy | None = None) -> Iterator[Client]:
        """A client of what lives; waits until something does. Without ``retry`` it never tries again."""
        assert self._up.wait(60)
        with connect(self._address, timeout=30, retry=retry or RetryPolicy(attempts=1)) as client:
            yield client

    def _line(self) -> str:
        assert self._parent.stdout is not None
        return self._parent.stdout.readline()
