"""The engine: one thread that owns the model. Work goes in, events come out.

Work is a generator that yields ops (:mod:`vflow_server.engine.ops`) and continues when they are done. In every round
the engine advances all running work to its next op and passes the ops to a scheduler, which does as many of them as fit
in one step of the model. So a long answer does not hold up the others, and cancelled work ends within a step. When
there is nothing to do the thread sleeps until new work, a cancellation or a future wakes it. The engine knows nothing
of calls, sessions or the model: the work that is submitted carries them.
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
from vflow_server.watchdog.pulse import Pulse

E = TypeVar("E")
R = TypeVar("R")
V = TypeVar("V")

Steps = Generator[Op | None, None, R]
"""Yields ops, or None to let other work run first; returns the result."""

Work = Callable[[Callable[[E], None]], Steps[R]]
"""Takes a function that emits events, and returns the steps.

Closing the generator cancels the work: it must undo what it did and let GeneratorExit pass.
"""

log = structlog.get_logger(__name__)


class WorkCancelled(Exception):
    """The work was cancelled before it had a result, and has undone what it did."""


class Outbox:
    """Messages from the engine's thread to event loops, delivered with one wake-up a round."""

    def __init__(self) -> None:
        self._messages: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, message: Callable[[], None]) -> None:
        """Call ``message`` on ``loop`` at the next delivery; messages stay in order."""
        self._messages.setdefault(loop, []).append(message)

    def deliver(self) -> None:
        """Deliver all messages that were put."""
        if not self._messages:
            return
        messages, self._messages = self._messages, {}
        for loop, batch in messages.items():
            try:
                loop.call_soon_threadsafe(_call_all, batch)
            except RuntimeError:  # the event loop is closed: nobody waits for the messages
                log.debug("event loop closed before the engine")


def _call_all(messages: Sequence[Callable[[], None]]) -> None:
    for message in messages:
        message()


class Ticket(Generic[E, R]):
    """The submitter's handle of work. Its methods are for the event loop's thread, unless they say otherwise.

    Attributes:
        cancelled: whether the work was cancelled.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, outbox: Outbox, wake: Callable[[], None]) -> None:
        self._loop = loop
        self._outbox = outbox
        self._wake = wake
        self._events: list[E] = []
        self._arrival: asyncio.Future[None] | None = None
        self._outcome: asyncio.Future[R] = loop.create_future()
        # Marks the exception as retrieved: after a cancelled call nobody asks for the outcome.
        self._outcome.add_done_callback(lambda outcome: outcome.cancelled() or outcome.exception())
        self.cancelled = False

    def cancel(self) -> None:
        """Ask the engine to end the work within a step. Idempotent; no effect once the work has ended."""
        if not self.cancelled and not self._outcome.done():
            self.cancelled = True
            self._wake()

    async def events(self) -> AsyncIterator[E]:
        """The events of the work as they are emitted, until the work ends. One reader at a time."""
        while batch := await self.next_events():
            for event in batch:
                yield event

    async def next_events(self) -> Sequence[E]:
        """Wait for the next event; returns all that have come since the last call, none if the work has ended."""
        while not self._events and not self._outcome.done():
            self._arrival = self._loop.create_future()
            await self._arrival
        batch, self._events = self._events, []
        return batch

    async def result(self) -> R:
        """Wait for the result of the work.

        Raises:
            WorkCancelled: the work was cancelled.
            Exception: the exception that the work raised.
        """
        return await asyncio.shield(self._outcome)

    async def ended(self, patience: float | None = None) -> None:
        """Wait until the work has ended in any way; at most ``patience`` seconds, None: without limit."""
        await asyncio.wait([self._outcome], timeout=patience)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on the event loop as soon as the work has ended in any way."""
        self._outcome.add_done_callback(lambda _: callback())

    def on_result(self, callback: Callable[[R], None]) -> None:
        """Call ``callback`` with the result, on the event loop; never if the work fails or is cancelled."""

        def deliver(outcome: asyncio.Future[R]) -> None:
            if not outcome.cancelled() and outcome.exception() is None:
                callback(outcome.result())

        self._outcome.add_done_callback(deliver)

    def emit(self, event: E) -> None:
        """Deliver an event. For the engine's thread."""
        self._outbox.put(self._loop, partial(self._arrive, event))

    def succeed(self, result: R) -> None:
        """Deliver the result. For the engine's thread."""
        self._outbox.put(self._loop, partial(self._end, self._outcome.set_result, result))

    def fail(self, failure: Exception) -> None:
        """Deliver the exception that ended the work. For the engine's thread."""
        self._outbox.put(self._loop, partial(self._end, self._outcome.set_exception, failure))

    def _end(self, settle: Callable[[V], None], value: V) -> None:
        settle(value)
        self._notify()

    def _arrive(self, event: E) -> None:
        self._events.append(event)
        self._notify()

    def _notify(self) -> None:
        """Let the reader go on, once all that is being delivered has come."""
        if self._arrival is not None:
            if not self._arrival.done():
                self._arrival.set_result(None)
            self._arrival = None


class Recipient(Protocol):
    """The part of a ticket that a task uses."""

    cancelled: bool

    def fail(self, failure: Exception) -> None:
        """Deliver the exception that ended the work."""
        ...


class Task:
    """The engine's side of submitted work.

    Args:
        tenant: the tenant that the work belongs to.
        steps: the work; it delivers its own events and its own result.
        ticket: the submitter's handle.
        counted: whether the work counts towards the bound on running work.

    Attributes:
        op: the op that the work waits for; None if the work can continue.
    """

    def __init__(self, tenant: str, steps: Steps[None], ticket: Recipient, *, counted: bool = True) -> None:
        self.tenant = tenant
        self.ticket = ticket
        self.counted = counted
        self.op: Op | None = None
        self._steps = steps
        self._failure: Exception | None = None
        # Log lines of the work carry the ids of the call that submitted it.
        self._context = contextvars.copy_context()

    def done(self) -> None:
        """Mark the op as done, so that the work can continue."""
        self.op = None

    def fail(self, failure: Exception) -> None:
        """Raise ``failure`` in the work, at the op that it waits for."""
        self.op, self._failure = None, failure

    def advance(self) -> bool:
        """Run the work up to its next op; returns False when the work has ended."""
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
                log.exception("cancelled work failed to undo itself")  # its caller is gone: only the log can show it
            self.ticket.fail(error)
            return False
        return True

    def abandon(self, refusal: ServiceError) -> None:
        """Close the work and fail it with ``refusal``, because the engine is stopping."""
        try:
            self._steps.close()
        except Exception:
            log.exception("abandoned work failed to undo itself")
        self.ticket.fail(refusal)


Schedule = Callable[[Sequence[Task], Callable[[], None]], bool]
"""Does some of the ops of tasks, which come in the order in which they began.

The second argument wakes the engine; it may be called from any thread. Returns whether anything was done: if not, the
engine sleeps until it is woken.
"""


class Engine:
    """One thread that advances all work step by step.

    Args:
        waiting: how many submissions may wait for their first step; a tenant that has none waiting may exceed it (see
            :func:`~vflow_server.engine.fair_queue.may_admit`).
        running: how many submissions may run at once; the others wait. A tenant that has none running may exceed it.
        schedule: called once a round with the tasks that wait for an op.
        on_death: called in the engine's thread if the thread dies of an exception.

    Attributes:
        pulse: the pulse of the thread; beats in each round, and before each piece of work.
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
        self.pulse = Pulse()
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
        """Number of submissions that wait for their first step."""
        with self._changed:
            return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of submissions that are running, without background work and calls."""
        with self._changed:
            return sum(task.counted for task in self._running)

    def submit(self, work: Work[E, R], tenant: str, *, background: bool = False) -> Ticket[E, R]:
        """Submit work. Must be called on an event loop; that loop receives the events and the result.

        Args:
            work: the work.
            tenant: the tenant that the work belongs to. Tenants get equal shares; within a tenant, work starts in the
                order of its arrival.
            background: for work that runs in idle time only: it starts at once and does not count towards the bounds.
                The caller must bound how much such work there is.

        Raises:
            ServiceError: CAPACITY_EXHAUSTED when too much work waits, SERVER_STOPPING or ENGINE_FAILED when the engine
                accepts no more work.
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
            ServiceError: SERVER_STOPPING or ENGINE_FAILED when the engine accepts no more work.
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
        """End all work and the thread; returns when the thread has ended. Idempotent."""
        with self._changed:
            self._open = False
            self._wake_locked()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Wake the engine, so that it looks for something to do. For any thread."""
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
        self.pulse.begin()
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
        """Admit work, advance all work to its next op, and schedule a step; sleep if there is nothing to do."""
        self.pulse.beat()
        tasks = self._admit()
        for task in tasks:
            self.pulse.beat()
            if (task.op is None or task.ticket.cancelled) and not task.advance():
                task.op = None
                with self._changed:
                    self._running.remove(task)
        self._outbox.deliver()
        waiting = [task for task in tasks if task.op is not None]
        self.pulse.beat()
        progress = self._schedule(waiting, self.wake)
        # Do not sleep while work can continue at once: an op was done, work yielded None, or work ended, so that other
        # work can be admitted.
        if not progress and len(waiting) == len(tasks):
            self.pulse.rest()
            with self._changed:
                while self._open and not self._woken:
                    self._changed.wait()
            self.pulse.beat()

    def _admit(self) -> list[Task]:
        """The tasks of the next round, in the order in which they began, but cancelled ones first."""
        with self._changed:
            self._woken = False
            self._running.extend(self._waiting.take_cancelled())
            if len(self._waiting):
                running = Counter(task.tenant for task in self._running if task.counted)
                while (task := self._waiting.admit(running, self._max_running)) is not None:
                    self._running.append(task)
                    running[task.tenant] += 1
            tasks = list(self._running)
        # Cancelled work releases its memory before other work asks for memory.
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
