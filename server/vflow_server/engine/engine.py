"""The engine: one thread that owns the model. Units of work go in, events come out.

Work is a generator that yields what it needs of the model and is sent the answer. In every round the engine takes all
running work to its next need, and hands the needs to a scheduler, which meets as many as it sees fit in one step of the
model: so a long answer holds nobody up, and cancelled work ends within a step. Knows no calls, no sessions and no
model: whoever submits work brings them along.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

import structlog

from vflow_server.engine.fair_queue import FairQueue
from vflow_server.rpc.errors import ServiceError, engine_failed, server_stopping

E = TypeVar("E")
R = TypeVar("R")

Steps = Generator[Any, Any, R]
"""Yields needs, or None where it only lets others have their turn; returns the result."""

Work = Callable[[Callable[[E], None]], Steps[R]]
"""Work: given a function that emits events, the steps.

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


class Task(Generic[E, R]):
    """The engine's end of submitted work.

    Attributes:
        tenant: whose work it is.
        need: what the work waits for; None if it can go on.
        counted: whether it takes a place of those that there are for running work.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tenant: str,
        work: Work[E, R],
        wake: Callable[[], None],
        *,
        counted: bool = True,
    ) -> None:
        self.loop = loop
        self.tenant = tenant
        self.counted = counted
        self.ticket: Ticket[E, R] = Ticket(loop, wake)
        self.need: Any = None
        self._answer: Any = None
        self._failure: Exception | None = None
        self._steps = work(self._emit)
        # What is logged during the work says whose it is.
        self._context = contextvars.copy_context()

    def answer(self, answer: Any) -> None:
        """Meet the need."""
        self.need, self._answer = None, answer

    def fail(self, failure: Exception) -> None:
        """Raise ``failure`` where the work waits for its need."""
        self.need, self._failure = None, failure

    def advance(self) -> bool:
        """Go on to the next need; False when the work has ended."""
        answer, failure = self._answer, self._failure
        self._answer = self._failure = None
        try:
            if self.ticket.cancelled:
                self._context.run(self._steps.close)
                raise WorkCancelled
            if failure is None:
                self.need = self._context.run(self._steps.send, answer)
            else:
                self.need = self._context.run(self._steps.throw, failure)
        except StopIteration as end:
            self._tell(self._end, end.value, None)
        except Exception as error:
            if self.ticket.cancelled and not isinstance(error, WorkCancelled):
                log.exception("cancelled work failed to undo itself")  # its caller is gone: nobody else would tell
            self._tell(self._end, None, error)
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
        waiting: how much submitted work may wait for its first step; a tenant that has none waiting may go beyond.
        running: how much work may be under way at once; what is beyond waits, but for a tenant that has none running.
        schedule: called once a round with the tasks that need something, in the order in which they began; meets one
            need at least.
        on_death: called in the engine's thread if it ends other than by :meth:`stop`.
    """

    def __init__(
        self,
        *,
        waiting: int,
        running: int,
        schedule: Callable[[Sequence[Task[Any, Any]]], None] = lambda tasks: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._schedule = schedule
        self._most_running = running
        self._on_death = on_death
        self._changed = threading.Condition()
        self._waiting: FairQueue[Task[Any, Any]] = FairQueue(waiting)
        self._running: deque[Task[Any, Any]] = deque()
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

    @property
    def waiting(self) -> int:
        """How much work waits for its first step."""
        with self._changed:
            return len(self._waiting)

    @property
    def running(self) -> int:
        """How much work is under way, not counting what only takes spare time."""
        with self._changed:
            return sum(task.counted for task in self._running)

    def submit(
        self, work: Work[E, R], tenant: str, *, housekeeping: bool = False, background: bool = False
    ) -> Ticket[E, R]:
        """Hand in work; must be called on an event loop, which is the one that hears of the events.

        Args:
            work: what to do.
            tenant: whose work it is: tenants get equal shares, the work of one is done in the order of its arrival.
            housekeeping: work that frees something: it overtakes what waits and does not count against the bound.
            background: work that only takes spare time: it waits for no place and takes none from others. Whoever
                submits such work must bound how much there is of it.

        Raises:
            ServiceError: CAPACITY_EXHAUSTED when too much work waits, SERVER_STOPPING or ENGINE_FAILED when the engine
                takes none any more.
        """
        task = Task(asyncio.get_running_loop(), tenant, work, self._wake, counted=not (housekeeping or background))
        with self._changed:
            if not self._open:
                raise self._refusal()
            if housekeeping:
                self._running.appendleft(task)
            elif background:
                self._running.append(task)
            else:
                self._waiting.put(task)
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
            while (tasks := self._round()) is not None:
                for task in tasks:
                    if (task.need is None or task.ticket.cancelled) and not task.advance():
                        self._remove(task)
                if needing := [task for task in tasks if task.need is not None]:
                    self._schedule(needing)
        except BaseException:
            log.exception("the engine died")
            self._refusal = engine_failed
            self._on_death()
        finally:
            self._abandon_all()

    def _round(self) -> list[Task[Any, Any]] | None:
        """Wait for something to do; the work of the next round in the order in which it began, None to stop."""
        with self._changed:
            while self._open and not self._running and not len(self._waiting):
                self._changed.wait()
            if not self._open:
                return None
            self._running.extend(self._waiting.take_cancelled())
            running = Counter(task.tenant for task in self._running if task.counted)
            while (task := self._waiting.admit(running, self._most_running)) is not None:
                self._running.append(task)
                running[task.tenant] += 1
            # Cancelled work gives its memory back before anybody else asks for memory.
            return sorted(self._running, key=lambda task: not task.ticket.cancelled)

    def _remove(self, task: Task[Any, Any]) -> None:
        task.need = None
        with self._changed:
            self._running.remove(task)

    def _abandon_all(self) -> None:
        with self._changed:
            self._open = False
            left = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting = FairQueue(0)
        for task in left:
            task.abandon(self._refusal())
