"""A pulse: how a thread or a task shows that it goes on."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

R = TypeVar("R")


class Pulse:
    """Belongs to one thread or task, which beats as it works and rests while it waits for work. Others only look.

    Attributes:
        beats: how often it has beaten.
        resting: whether it waits for something to do.
        thread: the thread; None for a task, and before the thread has begun.
    """

    def __init__(self) -> None:
        self.beats = 0
        self.resting = True
        self.thread: threading.Thread | None = None

    def begin(self) -> None:
        """Make the pulse that of the calling thread."""
        self.thread = threading.current_thread()

    def beat(self) -> None:
        """Show that a piece of work begins, or that a long one goes on."""
        self.resting = False
        self.beats += 1

    def rest(self) -> None:
        """Show that there is nothing to do, for as long as it takes."""
        self.resting = True

    @contextmanager
    def working(self) -> Iterator[None]:
        """A piece of work."""
        self.beat()
        try:
            yield
        finally:
            self.rest()


class PulsedExecutor(ThreadPoolExecutor):
    """An executor of one thread, which has a pulse.

    Args:
        name: name of the thread.
        niceness: how far the thread, and those that it starts, stand back behind others where processors are short.
            Only Linux knows this of threads.

    Attributes:
        pulse: beats once for each piece of work, and whenever the work makes it.
    """

    def __init__(self, name: str, *, niceness: int = 0) -> None:
        self.pulse = Pulse()
        self._niceness = niceness
        super().__init__(1, name, initializer=self._begin)

    def _begin(self) -> None:
        self.pulse.begin()
        if self._niceness and sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)

    def submit(self, work: Callable[..., R], /, *arguments: Any, **named: Any) -> Future[R]:
        """Run ``work`` on the thread."""

        def working() -> R:
            with self.pulse.working():
                return work(*arguments, **named)

        return super().submit(working)
