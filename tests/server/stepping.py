"""Threads that are let go step by step, so that a test decides in which order things happen."""

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from sqlite3 import Connection
from typing import TypeVar

import pytest

from vflow_server.engine.engine import Task
from vflow_server.store.archive import Archive

R = TypeVar("R")

ENGINE = "vflow-engine"
"""Name of the engine's thread."""


class Gate:
    """Holds a thread before each of its steps, while it is closed.

    Attributes:
        passed: number of steps that were let go.
        holding: whether a thread stands before it.
    """

    def __init__(self) -> None:
        self.passed = 0
        self.holding = False
        self._changed = threading.Condition()
        self._open = True
        self._let_go = 0

    def enter(self) -> None:
        """Wait until the step may be taken. For the thread that is held."""
        with self._changed:
            self.holding = True
            assert self._changed.wait_for(lambda: self._open or self._let_go, timeout=20), "the test has let go nothing"
            self.holding = False
            self.passed += 1
            self._let_go = max(self._let_go - 1, 0)

    def close(self) -> None:
        """Hold the thread before its next step."""
        with self._changed:
            self._open, self._let_go = False, 0

    def open(self) -> None:
        """Hold the thread no more."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def step(self) -> bool:
        """Let one step go; returns False if no thread stands before the gate."""
        with self._changed:
            if self.holding and not self._let_go:
                self._let_go = 1
                self._changed.notify_all()
                return True
            return False


class Stepping:
    """The gates of the engine, before each piece of its work and each action that it submits, and of the journal.

    Args:
        monkeypatch: puts the gates in place.

    Attributes:
        fails: number of the journal's action that fails, counted from the latest :meth:`held`; 0: none does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.journal = Gate(), Gate()
        self.fails = 0
        self._actions = 0
        advance, submit = Task.advance, Archive.submit

        def held_advance(task: Task) -> bool:
            self.engine.enter()
            return advance(task)

        def held_submit(archive: Archive, action: Callable[[Connection], R]) -> Future[R]:
            def held(connection: Connection) -> R:
                self.journal.enter()
                self._actions += 1
                if self._actions == self.fails:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return action(connection)

            if threading.current_thread().name == ENGINE:
                self.engine.enter()
            return submit(archive, held)

        monkeypatch.setattr(Task, "advance", held_advance)
        monkeypatch.setattr(Archive, "submit", held_submit)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold both threads within the block, but for the steps that are let go."""
        self._actions = 0
        self.engine.close()
        self.journal.close()
        try:
            yield
        finally:
            self.fails = 0
            self.engine.open()
            self.journal.open()

    async def settle(self) -> None:
        """Wait until nothing moves any more without a step that is let go.

        A thread that the machine does not run for a while may be taken for one that stands still. Then the schedule is
        another one than meant, but as possible as any.
        """
        still, before = 0, None
        while still < 2:
            await asyncio.sleep(0.0004)
            now = (self.engine.passed, self.engine.holding, self.journal.passed, self.journal.holding)
            still, before = (still + 1 if now == before else 0), now

    async def step(self, first: Gate) -> bool:
        """Let one step go, of ``first`` if it can; returns False if there is none to let go."""
        await self.settle()
        other = self.journal if first is self.engine else self.engine
        return first.step() or other.step()
