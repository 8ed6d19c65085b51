"""A thread for work in pieces that needs no model, such as tokenizing: it must hold up neither the engine nor calls."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from vflow_server.engine.fair_queue import RoundRobin
from vflow_server.watchdog.pulse import Pulse
from vflowopt.compression.pieces import Pieces

T = TypeVar("T")

_LONGEST_PAUSE = 0.05
"""Seconds. After each piece but the first, the thread pauses for as long as the piece took, and this long at most: long
work may take half a core from the answers."""


@dataclass(eq=False)
class _Job:
    """Work that has not ended, and how many of its pieces have run."""

    tenant: str
    pieces: Pieces[Any]
    future: Future[Any]
    run: int = 0


class PieceThread:
    """Runs a piece at a time. Tenants take turns; of a tenant's work, that with the fewest pieces run comes first.

    So short work waits for no more than a piece of each other tenant's, and one of its own tenant's.

    Args:
        name: name of the thread.

    Attributes:
        pulse: the pulse of the thread; beats once for each piece.
    """

    def __init__(self, name: str) -> None:
        self.pulse = Pulse()
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._tenants = RoundRobin()
        self._closed = False
        # A daemon, because a piece cannot be interrupted: the process need not wait for it to end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, pieces: Pieces[T], tenant: str) -> Future[T]:
        """Run work. For any thread.

        Args:
            pieces: the work; it is closed if it is cancelled.
            tenant: the tenant that it belongs to.

        Returns:
            A future of its result. Cancelling it ends the work after the piece that is running.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                future.cancel()
            else:
                self._jobs.append(_Job(tenant, pieces, future))
                self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel all work. Does not wait for the piece that is running."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.future.cancel()
            self._changed.notify()

    def _run(self) -> None:
        self.pulse.begin()
        while (job := self._next()) is not None:
            try:
                if job.future.cancelled():
                    job.pieces.close()
                else:
                    begun = time.perf_counter()
                    next(job.pieces)
                    job.run += 1
                    if job.run > 1:
                        time.sleep(min(time.perf_counter() - begun, _LONGEST_PAUSE))
                    continue
            except StopIteration as end:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_result(end.value)
            except BaseException as failure:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(failure)
            with self._changed:
                self._jobs.remove(job)

    def _next(self) -> _Job | None:
        """Wait for work; what to run a piece of, None if the thread is to end."""
        with self._changed:
            self.pulse.rest()
            while not (self._jobs or self._closed):
                self._changed.wait()
            self.pulse.beat()
            if self._closed:
                return None
            job = self._tenants.order(sorted(self._jobs, key=lambda job: job.run))[0]
            self._tenants.served(job.tenant)
            return job
