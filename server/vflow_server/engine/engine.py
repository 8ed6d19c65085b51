"""The engine: one thread that owns the model. Work goes in, events come out.

Work is a generator that yields ops (:mod:`vflow_server.engine.ops`) and goes on when they are done. In every round the
engine takes all running work to its next op and hands the ops to a scheduler, which does as many as it sees fit in one
step of the model. So a long answer holds nobody up, and cancelled work ends within a step. Where nothing is left to do
the thread sleeps until it is woken: by new work, a cancellation, or a future. The engine knows no calls, no sessions
and no model: whoever submits work brings them along.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

import structlog

from vflow_server.engine.fair_queue import FairQueue
from vflow_server.engine.ops import Op
from vflow_server.rpc.errors import ServiceError, engine_failed, server_stopping

E = TypeVar("E")
R = TypeVar("R")
V = TypeVar("V")

Steps = Generator[Op | None, None, R]
"""Yields ops, or None where it only lets others have their turn; returns the result."""

Work = Callable[[Callable[[E], None]], Steps[R]]
"""Work: given a function that emits events, the steps.

Closing the generator means that the work is cancelled: it must undo what it did and let GeneratorExit pass.
"""

log = structlog.get_logger(__name__)


class WorkCancelled(Exception):
    """The work was cancelled before it had a result; it has undone what it did."""


class Outbox:
    """What the engine's thread has to say to event loops: collected, and delivered with one wake-up a round."""

    def __init__(self) -> None:
        self._messages: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, message: Callable[[], None]) -> None:
        """Have ``message`` called on ``loop`` with the next delivery; messages stay in order."""
        self._messages.setdefault(loop, []).append(message)

    def deliver(self) -> None:
        """Deliver all that was collected."""
        if not self._messages:
            return
        messages, self._messages = self._messages, {}
        for loop, those in messages.items():
            try:
                loop.call_soon_threadsafe(_call_all, those)
            except RuntimeError:  # the event loop is closed: nobody is left to hear it
                log.debug("event loop closed before the engine")


def _call_all(messages: Sequence[Callable[[], None]]) -> None:
    for message in messages:
        message()


class Ticket(Generic[E, R]):
    """The event loop's end of submitted work. Its methods are for the event loop's thread, unless they say otherwise.

    Attributes:
        cancelled: whether the work is to be ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, outbox: Outbox, wake: Callable[[], None]) -> None:
        self._loop = loop
        self._outbox = outbox
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

    def emit(self, event: E) -> None:
        """Deliver an event of the work. For the engine's thread."""
        self._outbox.put(self._loop, partial(self._events.put_nowait, event))

    def succeed(self, result: R) -> None:
        """Deliver the result of the work. For the engine's thread."""
        self._outbox.put(self._loop, partial(self._end, self._outcome.set_result, result))

    def fail(self, failure: Exception) -> None:
        """Deliver why the work has none. For the engine's thread."""
        self._outbox.put(self._loop, partial(self._end, self._outcome.set_exception, failure))

    def _end(self, settle: Callable[[V], None], value: V) -> None:
        settle(value)
        self._events.put_nowait(None)


class Caller(Protocol):
    """What a task sees of the ticket."""

    cancelled: bool

    def fail(self, failure: Exception) -> None:
        """Deliver why the work has no result."""
        ...


class Task:
    """The engine's end of submitted work.

    Args:
        tenant: whose work it is.
        steps: the work; it delivers its events and its result by itself.
        ticket: who is waiting for it.
        counted: whether it takes one of the places for running work.

    Attributes:
        op: what the work waits for; None if it can go on.
    """

    def __init__(self, tenant: str, steps: Steps[None], ticket: Caller, *, counted: bool = True) -> None:
        self.tenant = tenant
        self.ticket = ticket
        self.counted = counted
        self.op: Op | None = None
        self._steps = steps
        self._failure: Exception | None = None
        # What is logged during the work says whose it is.
        self._context = contextvars.copy_context()

    def done(self) -> None:
        """The op is done: the work can go on."""
        self.op = None

    def fail(self, failure: Exception) -> None:
        """Raise ``failure`` where the work waits for its op."""
        self.op, self._failure = None, failure

    def advance(self) -> bool:
        """Go on to the next op; False when the work has ended."""
        failure, self._failure = self._failure, None
        try:
            if self.ticket.cancelled:
                self._context.run(self._steps.close)
                raise WorkCancelled
            if failure is None:
                self.op = self._context.run(next, self._steps)
            else:
                self.op = self._context.run(self._steps.throw, failure)
        except StopIteration:
            return False
        except Exception as error:
            if self.ticket.cancelled and not isinstance(error, WorkCancelled):
                log.exception("cancelled work failed to undo itself")  # its caller is gone: nobody else would tell
            self.ticket.fail(error)
            return False
        return True

    def abandon(self, refusal: ServiceError) -> None:
        """End the work without another step: the engine is going down."""
        try:
            self._steps.close()
        except Exception:
            log.exception("abandoned work failed to undo itself")
        self.ticket.fail(refusal)


Schedule = Callable[[Sequence[Task], Callable[[], None]], bool]
"""Does some of the ops of tasks, given in the order in which they began; told how to wake the engine from any thread.

Returns whether anything was done: if not, the engine sleeps until it is woken.
"""


class Engine:
    """One thread that advances work, step by step, in turn.

    Args:
        waiting: how much submitted work may wait for its first step; a tenant that has none waiting may go beyond.
        running: how much work may be under way at once; what is beyond waits, but for a tenant that has none running.
        schedule: called once a round with the tasks that wait for an op.
        on_death: called in the engine's thread if it ends other than by :meth:`stop`.
    """

    def __init__(
        self,
        *,
        waiting: int,
        running: int,
        schedule: Schedule = lambda tasks, wake: False,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._schedule = schedule
        self._max_running = running
        self._on_death = on_death
        self._changed = threading.Condition()
        self._woken = False
        self._waiting: FairQueue[Task] = FairQueue(waiting)
        self._running: deque[Task] = deque()
        self._outbox = Outbox()
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
        """How much work is under way, not counting what only takes idle time."""
        with self._changed:
            return sum(task.counted for task in self._running)

    def submit(self, work: Work[E, R], tenant: str, *, background: bool = False) -> Ticket[E, R]:
        """Hand in work; must be called on an event loop, which is the one that receives the events.

        Args:
            work: what to do.
            tenant: whose work it is: tenants get equal shares, the work of one is done in the order of its arrival.
            background: work that only takes idle time: it waits for no place and takes none from others. Whoever
                submits such work must bound how much there is of it.

        Raises:
            ServiceError: CAPACITY_EXHAUSTED when too much work waits, SERVER_STOPPING or ENGINE_FAILED when the engine
                takes none any more.
        """
        ticket, task = self._task(work, tenant, counted=not background)
        with self._changed:
            self._check_open()
            if background:
                self._running.append(task)
            else:
                self._waiting.put(task)
            self._wake_locked()
        return ticket

    def call(self, function: Callable[[], R], tenant: str) -> Ticket[None, R]:
        """Call ``function`` in the engine's thread between two steps, before any work that waits.

        Raises:
            ServiceError: SERVER_STOPPING or ENGINE_FAILED when the engine takes no work any more.
        """

        def work(emit: Callable[[None], None]) -> Steps[R]:
            return function()
            yield  # makes this a generator

        ticket, task = self._task(work, tenant, counted=False)
        with self._changed:
            self._check_open()
            self._running.appendleft(task)
            self._wake_locked()
        return ticket

    def stop(self) -> None:
        """Cancel all work and end the thread; returns when it has ended. Idempotent."""
        with self._changed:
            self._open = False
            self._wake_locked()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Have the engine look again whether there is something to do. For any thread."""
        with self._changed:
            self._wake_locked()

    def _wake_locked(self) -> None:
        self._woken = True
        self._changed.notify()

    def _check_open(self) -> None:
        if not self._open:
            raise self._refusal()

    def _task(self, work: Work[E, R], tenant: str, *, counted: bool) -> tuple[Ticket[E, R], Task]:
        ticket: Ticket[E, R] = Ticket(asyncio.get_running_loop(), self._outbox, self.wake)

        def steps() -> Steps[None]:
            ticket.succeed((yield from work(ticket.emit)))

        return ticket, Task(tenant, steps(), ticket, counted=counted)

    def _run(self) -> None:
        try:
            while self._open:
                self._round()
        except BaseException:
            log.exception("the engine died")
            self._refusal = engine_failed
            self._on_death()
        finally:
            self._abandon_all()

    def _round(self) -> None:
        """Admit work, take it to its next op, and have the scheduler do some; sleep where there is nothing to do."""
        tasks = self._admit()
        for task in tasks:
            if (task.op is None or task.ticket.cancelled) and not task.advance():
                task.op = None
                with self._changed:
                    self._running.remove(task)
        self._outbox.deliver()
        waiting = [task for task in tasks if task.op is not None]
        progress = bool(waiting) and self._schedule(waiting, self.wake)
        # Work that can go on at once: what was just done, what only let others have their turn, and what ended, which
        # makes room for what waits.
        if not progress and len(waiting) == len(tasks):
            with self._changed:
                while self._open and not self._woken:
                    self._changed.wait()

    def _admit(self) -> list[Task]:
        """The work of the next round in the order in which it began; cancelled work first."""
        with self._changed:
            self._woken = False
            self._running.extend(self._waiting.take_cancelled())
            if len(self._waiting):
                running = Counter(task.tenant for task in self._running if task.counted)
                while (task := self._waiting.admit(running, self._max_running)) is not None:
                    self._running.append(task)
                    running[task.tenant] += 1
            tasks = list(self._running)
        # Cancelled work gives its memory back before anybody else asks for memory.
        if any(task.ticket.cancelled for task in tasks):
            tasks.sort(key=lambda task: not task.ticket.cancelled)
        return tasks

    def _abandon_all(self) -> None:
        with self._changed:
            self._open = False
            left = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting = FairQueue(0)
        for task in left:
            task.abandon(self._refusal())
        self._outbox.deliver()
