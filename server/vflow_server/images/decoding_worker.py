"""A worker: a process that decodes pictures, as the service sees it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from vflow_server.images import decoding_process
from vflow_server.images.decoding_process import FILE, MOST_MESSAGE, READY, Task, memory_file
from vflowopt.media.picture import PictureError


class WorkerDied(Exception):
    """The process ended before it had answered.

    Attributes:
        exit_code: of the process; the negative number of a signal.
        killed: whether :meth:`Worker.kill` ended it.
    """

    def __init__(self, exit_code: int, *, killed: bool) -> None:
        super().__init__(f"the process ended with {describe(exit_code)}")
        self.exit_code = exit_code
        self.killed = killed


class MemoryUsedUp(Exception):
    """Decoding would have taken more memory than it may."""


class Worker:
    """One process at a time, which is replaced by the next task when it has died.

    Its methods block, and one thread at a time may call them; :meth:`kill` is for any thread. A process dies with the
    thread that started it.

    Args:
        niceness: how far the process gives way to others, 0 to 19.

    Attributes:
        seconds: processor time that the latest file has taken.
    """

    def __init__(self, niceness: int = 0) -> None:
        self.seconds = 0.0
        self._niceness = niceness
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()
        self._killed = False
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process id; None while there is no process that can decode."""
        return None if self._process is None or self._killed else self._process.pid

    def start(self) -> None:
        """Start a process if there is none, and wait until it can decode.

        Raises:
            OSError: no process can be started.
            WorkerDied: it ended at once.
        """
        if self.pid is not None:
            return
        self.release()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there, self._lock:
            if self._closed:
                here.close()
                raise WorkerDied(-signal.SIGKILL, killed=True)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", decoding_process.__name__, str(self._niceness)],
                    stdin=there.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=_environment(),
                    process_group=0,
                )
            except BaseException:
                here.close()
                raise
            self._channel = here
            self._killed = False
        with suppress(OSError):
            if here.recv(MOST_MESSAGE) == READY:
                return
        raise self._died()

    def load(self, data: bytes) -> str:
        """Hand over a file, for :meth:`decode`; returns its SHA-256 in hex.

        A process that has died while it was idle is replaced.

        Raises:
            OSError: no process can be started, or there is no memory or descriptor for the file.
            WorkerDied: the process ended.
            ValueError: it did not answer as it should.
        """
        self.seconds = 0.0
        file = memory_file(data)
        try:
            self.start()
            try:
                answer, _ = self._ask(FILE, [file])
            except WorkerDied as death:
                if death.killed:
                    raise
                self.start()
                answer, _ = self._ask(FILE, [file])
            return str(answer["digest"])
        finally:
            os.close(file)

    def decode(self, task: Task) -> npt.NDArray[np.uint8]:
        """The pixels of the latest file, uint8 [height, width, 3], decoded as ``task`` says.

        Raises:
            WorkerDied: the process ended: by SIGPROF when its time was up, or by the file.
            MemoryUsedUp: decoding would take more memory than it may.
            PictureError: the file is not a valid picture.
            ValueError: the process did not answer as it should.
        """
        begun = time.monotonic()
        try:
            answer, files = self._ask(task.message(), [])
        except WorkerDied:
            self.seconds += min(task.seconds, time.monotonic() - begun)
            raise
        try:
            return _pixels(answer, files, task)
        finally:
            for each in files:
                os.close(each)

    def _ask(self, message: bytes, files: list[int]) -> tuple[dict[str, Any], list[int]]:
        """The answer to a message, and the descriptors that came with it."""
        channel = self._channel
        received: list[int] = []
        if channel is None:
            raise WorkerDied(-signal.SIGKILL, killed=True)
        try:
            socket.send_fds(channel, [message], files)
            text, received, _, _ = socket.recv_fds(channel, MOST_MESSAGE, 1)
        except OSError:
            text = b""
        if not text:
            raise self._died()
        try:
            answer = json.loads(text)
            self.seconds += float(answer["seconds"])
        except BaseException:
            for each in received:
                os.close(each)
            raise
        return answer, received

    def kill(self) -> None:
        """End the process at once, if there is one. For any thread."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End the process for good. For any thread."""
        with self._lock:
            self._closed = True
        self.kill()

    def release(self) -> None:
        """Free what a process that was killed has left."""
        if self._process is not None:
            self._died()

    def _died(self) -> WorkerDied:
        """Clear away the process, which has ended or does not answer."""
        assert self._process is not None and self._channel is not None
        self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        with self._lock:
            process, self._process, self._channel = self._process, None, None
            process.kill()  # does nothing to one that has ended
            return WorkerDied(process.wait(), killed=self._killed)


def describe(exit_code: int) -> str:
    """How a process ended, in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    return signal.Signals(-exit_code).name if -exit_code in signal.valid_signals() else f"signal {-exit_code}"


def _environment() -> dict[str, str]:
    """What the process finds its modules with, and no more: the service's variables may hold tokens."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
    # One thread, as it decodes one picture: the others of numpy's libraries would take memory and do nothing.
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}


def _pixels(answer: Mapping[str, object], files: list[int], task: Task) -> npt.NDArray[np.uint8]:
    """What a process answered. It may be in the hands of a file: its answer has to be within the limits."""
    match answer:
        case {"height": int(height), "width": int(width)} if files and 0 < height * width <= task.limits.max_pixels:
            pixels = np.empty((height, width, 3), np.uint8)
            with open(files[0], "rb", buffering=0, closefd=False) as file:
                file.seek(0)
                while left := pixels.nbytes - file.tell():
                    if not file.readinto(pixels.data.cast("B")[-left:]):
                        raise ValueError("a worker sent fewer pixels than it promised")
            pixels.flags.writeable = False
            return pixels
        case {"reason": str(reason), "message": str(message), "metadata": dict(metadata)}:
            raise PictureError(reason, message, **metadata)
        case {"memory": int()}:
            raise MemoryUsedUp
    raise ValueError(f"a worker sent {answer!r:.200}")
