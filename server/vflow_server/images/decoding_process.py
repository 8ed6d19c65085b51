"""The program of a worker process: decodes one picture after another, each within limits of time and memory.

The files are not trusted, so what reads them is a process that the service can do without. The kernel ends it when its
time is up, even where a decoder holds the interpreter's lock, and when the service dies. It is no sandbox: it runs as
the user of the service.

On a socket every request has one response. A request is a file, whose response is its digest, or a task: what to decode
the latest file with. The file goes there, and the pixels come back, as the descriptor of a memory file: a descriptor
costs the same for every size, and nothing is left behind when a process dies. Messages are JSON, which cannot make the
service run code, as unpickling would.
"""

from __future__ import annotations

import array
import ctypes
import hashlib
import json
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from PIL import AvifImagePlugin

from vflowopt.media.picture import Picture, PictureError, PictureLimits

MOST_MESSAGE = 1 << 16
"""Bytes of a message at most."""

READY = b"ready"
"""The message of a process that has imported everything."""

FILE = b"file"
"""The message that comes with the descriptor of a file."""

_MOST_TEXT = 1000
"""Characters of a message for people at most: decoders may quote the file in it."""

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Task:
    """What to decode a file with.

    Attributes:
        limits: the limits of the picture.
        seconds: processor time; when it is up, SIGPROF ends the process.
        memory: bytes that decoding may take.
    """

    limits: PictureLimits
    seconds: float
    memory: int

    def message(self) -> bytes:
        """The task as a message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, message: bytes) -> Task:
        """The task of a message."""
        fields = json.loads(message)
        return cls(PictureLimits(**fields.pop("limits")), **fields)


def memory_file(*parts: Any) -> int:
    """The descriptor of a new file in memory that holds ``parts``, which are buffers.

    Raises:
        OSError: there is no memory for it, or no descriptor.
    """
    file = os.memfd_create("vflow-picture", os.MFD_CLOEXEC)
    try:
        for part in parts:
            left = memoryview(part).cast("B")
            while left:
                left = left[os.write(file, left) :]
        return file
    except BaseException:
        os.close(file)
        raise


def main() -> None:
    """Decode what comes through standard input, which is a socket, until its other end is closed.

    The argument is the niceness of the process.
    """
    _leave_the_service_alone(int(sys.argv[1]))
    # By default as many threads as there are cores, whose stacks would count against the bound on memory.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    channel = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    # Decoders write warnings about a file to standard error, which is the log of the service.
    os.dup2(os.open(os.devnull, os.O_RDWR), sys.stderr.fileno())
    channel.send(READY)
    used = _address_space()
    data = b""
    while True:
        message, files, _, _ = socket.recv_fds(channel, MOST_MESSAGE, 1)
        if not message:
            return
        before = time.process_time()
        pixels: list[int] = []
        answer: dict[str, Any]
        if files:
            with open(files[0], "rb") as file:
                file.seek(0)
                data = file.read()
            answer = {"digest": hashlib.sha256(data).hexdigest()}
        else:
            answer, pixels = _within(Task.parse(message), used + len(data), data)
            data = b""
        answer["seconds"] = time.process_time() - before
        sent = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", pixels))] if pixels else []
        channel.sendmsg([json.dumps(answer).encode()], sent)
        for each in pixels:
            os.close(each)


def _within(task: Task, used: int, data: bytes) -> tuple[dict[str, Any], list[int]]:
    """The response to ``task``, and the descriptor of the pixels if there are any."""
    resource.setrlimit(resource.RLIMIT_AS, (used + task.memory, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, task.seconds)
    try:
        picture = Picture.decode(data, task.limits)
        return {"height": picture.height, "width": picture.width}, [memory_file(picture.pixels)]
    except PictureError as error:
        return {"reason": error.reason, "message": str(error)[:_MOST_TEXT], "metadata": error.metadata}, []
    except MemoryError:
        return {"memory": task.memory}, []
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _leave_the_service_alone(niceness: int) -> None:
    """Die with the service, die before it where memory is short, and give way to it on the processor."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal
    os.nice(niceness)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold a user's picture
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # some containers forbid it; the limits above hold without it
        pass


def _address_space() -> int:
    """Bytes of address space that this process uses."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
