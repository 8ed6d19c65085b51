"""The engine: one thread that owns the model. Units of work go in, events come out.

Work is a generator: what it does between two ``yield``s is one step (a picture's encoding, a prefill, one decoded
token). The engine advances the running ones in turn, one step each, so a long answer does not hold up another
session's picture and a cancelled one ends within a step. Knows no calls, no sessions and no model: whoever submits
work brings them along.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, Generic, TypeVar

import structlog

from vflow_server.errors import CapacityExhausted, ServiceError, engine_failed, server_stopping

E = TypeVar("E")
R = TypeVar("R")

Steps = Generator[None, None, R]
Work = Callable[[Callable[[E], None]], Generator[None, None, R]]
"""Work: given a function that emits events, a generator whose return value is the result.

Closing the generator means that the work is cancelled: it must undo what it did and let GeneratorExit pass.
"""

log = structlog.get_logger(__name__)


class WorkCancelled(Exception):
    """The work was cancelled before it had a result; it has undone what it did."""


class Ticket(Generic[E, R]):
    """The event loop's end of submitted work. All methods are for the event loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._events: asyncio.Queue[E | None] = asyncio.Queue()
        self._outcome: asyncio.Future[R] = loop.create_future()
        # Nobody may be left to ask for the outcome: the caller of a cancelled call is gone.
        self._outcome.add_done_callback(lambda outcome: outcome.cancelled() or outcome.exception())
        self.cancelled = False

    def cancel(self) -> None:
        """Ask the engine to end the work within a step. Idempotent; too late once the work has its result."""
        if not self.cancelled and not self._outcome.done():
            self.cancelled = True
            self._wake()

    async def events(self) -> AsyncIterator[E]:
        """The events of the work as they come, until it has ended."""
        while (event := await self._events.get()) is not None:
            yield event

    async def result(self) -> R:
        """What the work returned.

        Raises:
            WorkCancelled: it was cancelled.
            Exception: whatever the work raised.
        """
        return await asyncio.shield(self._outcome)

    async def ended(self, patience: float | None = None) -> None:
        """Wait until the engine is through with the work, however it ended, but ``patience`` seconds at most."""
        await asyncio.wait([self._outcome], timeout=patience)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on the event loop as soon as the engine is through with the work."""
        self._outcome.add_done_callback(lambda _: callback())

    def on_result(self, callback: Callable[[R], None]) -> None:
        """Call ``callback`` with the result, on the event loop, if the work comes to one."""

        def deliver(outcome: asyncio.Future[R]) -> None:
            if not outcome.cancelled() and outcome.exception() is None:
                callback(outcome.result())

        self._outcome.add_done_callback(deliver)


class _Task(Generic[E, R]):
    """The engine's end of submitted work: the ticket and the generator."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Work[E, R], wake: Callable[[], None]) -> None:
        self.loop = loop
        self.ticket: Ticket[E, R] = Ticket(loop, wake)
        self._steps = work(self._emit)

    def advance(self) -> bool:
        """Run one step; False when that was the last one."""
        try:
            if self.ticket.cancelled:
                self._steps.close()
                raise WorkCancelled
            next(self._steps)
        except StopIteration as end:
            self._tell(self._end, end.value, None)
        except Exception as failure:
            if self.ticket.cancelled and not isinstance(failure, WorkCancelled):
                log.exception("cancelled work failed to undo itself")  # its caller is gone: nobody else would tell
            self._tell(self._end, None, failure)
        except BaseException:
            self._tell(self._end, None, engine_failed())
            raise
        else:
            return True
        return False

    def abandon(self, refusal: ServiceError) -> None:
        """End the work without another step: the engine is going down."""
        try:
            self._steps.close()
        except Exception:
            log.exception("abandoned work failed to undo itself")
        self._tell(self._end, None, refusal)

    def _emit(self, event: E) -> None:
        self._tell(self.ticket._events.put_nowait, event)

    def _end(self, result: R, failure: Exception | None) -> None:
        if failure is None:
            self.ticket._outcome.set_result(result)
        else:
            self.ticket._outcome.set_exception(failure)
        self.ticket._events.put_nowait(None)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed: nobody is left to be told
            log.debug("event loop closed before the engine")


class Engine:
    """One thread that advances work, step by step, in turn.

    Args:
        waiting: how much submitted work may wait for its first step.
        running: how much work may be under way at once; what is beyond waits.
        on_death: called in the engine's thread if it ends other than by :meth:`stop`.
    """

    def __init__(self, *, waiting: int, running: int, on_death: Callable[[], None] = lambda: None) -> None:
        self._most_waiting = waiting
        self._most_running = running
        self._on_death = on_death
        self._changed = threading.Condition()
        self._waiting: deque[_Task[Any, Any]] = deque()
        self._running: deque[_Task[Any, Any]] = deque()
        self._open = False
        self._refusal: Callable[[], ServiceError] = server_stopping
        self._thread = threading.Thread(target=self._run, name="vflow-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._open = True
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine takes work."""
        return self._open

    def submit(self, work: Work[E, R], *, housekeeping: bool = False) -> Ticket[E, R]:
        """Hand in work; must be called on an event loop, which is the one that hears of the events.

        Args:
            work: what to do.
            housekeeping: work that frees something: it overtakes what waits and does not count against the bound.

        Raises:
            ServiceError: CAPACITY_EXHAUSTED when too much work waits, SERVER_STOPPING or ENGINE_FAILED when the engine
                takes none any more.
        """
        task = _Task(asyncio.get_running_loop(), work, self._wake)
        with self._changed:
            if not self._open:
                raise self._refusal()
            if housekeeping:
                self._running.appendleft(task)
            elif len(self._waiting) >= self._most_waiting:
                raise CapacityExhausted(
                    "queue",
                    f"{self._most_waiting} requests already wait for the model; retry in a moment",
                    metadata={"waiting": self._most_waiting},
                )
            else:
                self._waiting.append(task)
            self._changed.notify()
        return task.ticket

    def stop(self) -> None:
        """Cancel all work and end the thread; returns when it has ended. Idempotent."""
        with self._changed:
            self._open = False
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        try:
            while (task := self._next()) is not None:
                if task.advance():
                    self._running.append(task)
        except BaseException:
            log.exception("the engine died")
            self._refusal = engine_failed
            self._on_death()
        finally:
            self._abandon_all()

    def _next(self) -> _Task[Any, Any] | None:
        """Wait for something to do and choose whose step comes next; None when the engine shall stop."""
        with self._changed:
            while self._open and not self._running and not self._waiting:
                self._changed.wait()
            if not self._open:
                return None
            # Cancelled work gives its memory back before anybody else asks for memory.
            for queue in (self._running, self._waiting):
                for task in queue:
                    if task.ticket.cancelled:
                        queue.remove(task)
                        return task
            while self._waiting and len(self._running) < self._most_running:
                self._running.append(self._waiting.popleft())
            return self._running.popleft()

    def _abandon_all(self) -> None:
        with self._changed:
            self._open = False
            left = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for task in left:
            task.abandon(self._refusal())
