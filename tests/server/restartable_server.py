"""A service process that is killed and started again, many times; the slow imports happen once, in its parent."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import psutil

from vflow_client import CapacityExhausted, Client, RetryPolicy, connect

_FORKING = """
import json, os, sys
import vflow_server.app
from vflow_server.cli import main

for line in sys.stdin:
    log, before, *arguments = json.loads(line)
    if not (process := os.fork()):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        exec(before)
        os._exit(main(arguments))
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
"""A service in a process of its own, forked from this one, which imports everything and then only forks."""


def free_port() -> int:
    """A port that is not in use."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


class Parent:
    """The process that others are copies of, one at a time."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout

    def start(self, log: Path, arguments: Sequence[str], before: str = "") -> None:
        """Begin a copy that does the command ``vflow`` with ``arguments``, and the Python code ``before`` first."""
        print(json.dumps([str(log), before, *arguments]), file=self._stdin, flush=True)

    def line(self) -> str:
        """The next line of the copy, or about it."""
        return self._stdout.readline()

    def close(self) -> None:
        """End; no copy may be left."""
        self._popen.kill()
        self._popen.wait()
        self._stdin.close()
        self._stdout.close()


class RestartableServer:
    """A service with the given flags; it is up when this returns, and again after :meth:`start`.

    Args:
        parent: whose copies are its lives; it has no others meanwhile.
        log: file that all its lives write their log to.
        before: Python code that each life begins with, to break something.
        flags: of ``vflow serve``, by name.
    """

    def __init__(self, parent: Parent, log: Path, before: str = "", **flags: object) -> None:
        self._parent = parent
        self._before = before
        self._log = log
        self._metrics_port = flags.get("metrics_port")
        settings = {"port": 0, "threads": 1, "log_format": "json", **flags}
        parts = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self._arguments = ["serve", *parts]
        self._up = threading.Event()
        self.start()

    def start(self) -> None:
        """Live again."""
        self._parent.start(self._log, self._arguments, self._before)
        self._process = int(self._parent.line())
        ready = self._parent.line()
        assert ready.startswith("VFlow is ready on "), self._log.read_text()
        self.address = ready.split()[-1]
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
        return int(self._parent.line())

    @property
    def process(self) -> psutil.Process:
        """The process that it lives in."""
        return psutil.Process(self._process)

    def gauges(self) -> dict[str, float]:
        """What its side port tells, by name with labels; for that ``metrics_port`` is to be a port of its own."""
        with urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=20) as response:
            lines = [line.rpartition(" ") for line in response.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def lost_pages(self, token: str | None = None) -> float:
        """KV pages that nobody has, once all sessions are deleted.

        Those that are kept for conversations which begin with the same picture make room for one that grows: if none is
        lost, it comes to hold all that are held. ``token`` is that of any tenant, where tokens are asked for.
        """
        words = 32
        with self.client(token=token) as client, client.session("full") as session:
            while True:
                gauges = self.gauges()
                own = session.state().kv_bytes / gauges["vflow_kv_page_bytes"]
                lost = gauges['vflow_kv_pages{state="used"}'] - own
                if not lost or not words:
                    return lost
                try:
                    session.ask("more " * words, max_new_tokens=1).read()
                except CapacityExhausted:
                    words //= 2

    def logged(self) -> list[dict[str, object]]:
        """What was logged in all lives. Death may come between a line and its end, which are written apart."""
        return [json.loads(line) for line in self._log.read_text().replace("}{", "}\n{").splitlines()]

    def close(self) -> None:
        """Have it dead."""
        if self._up.is_set():
            self.kill()

    @contextmanager
    def client(
        self, retry: RetryPolicy | None = None, tenant: str | None = None, token: str | None = None
    ) -> Iterator[Client]:
        """A client of what lives; waits until something does. Without ``retry`` it never tries again."""
        assert self._up.wait(60)
        retry = retry or RetryPolicy(attempts=1)
        with connect(self.address, timeout=30, retry=retry, tenant=tenant, token=token) as client:
            yield client
