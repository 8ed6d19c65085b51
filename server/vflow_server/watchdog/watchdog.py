"""The watchdog: looks once a second whether every thread and task that the service needs goes on.

One that has ended cannot be started again with what it held, and one that stands still may never go on. So the service
has failed as a whole, and whoever runs the process should start it again.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from vflow_server.watchdog.pulse import Pulse

LOOK_EVERY = 1.0
"""Seconds between two looks."""

PATIENCE_WITH_WORK = 10
"""How many times as long a thread may take that computes: a large model takes minutes for one step on a processor."""

log = structlog.get_logger(__name__)


class _Part:
    """A thread or a task that the service needs.

    Attributes:
        name: what the log calls it.
        still: seconds for which it has shown no sign of life: no beat, and if it ``computes`` no computing either.
        unbeaten: seconds for which it has not beaten, though it may have computed.
    """

    def __init__(
        self, name: str, pulse: Pulse, task: asyncio.Task[Any] | None = None, *, computes: bool = False
    ) -> None:
        self.name = name
        self.computes = computes
        self.still = 0.0
        self.unbeaten = 0.0
        self._pulse = pulse
        self._task = task
        self._beats = -1
        self._computed = 0

    @property
    def ended(self) -> bool:
        """Whether it goes on no more."""
        if self._task is not None:
            return self._task.done()
        thread = self._pulse.thread
        return thread is not None and not thread.is_alive()

    def look(self, seconds: float) -> None:
        """See whether it has shown a sign of life in the ``seconds`` since the last look."""
        beats = self._pulse.beats
        computed = _computed(self._pulse.thread) if self.computes else 0
        if self._pulse.resting or beats != self._beats:
            self.still = self.unbeaten = 0.0
        else:
            self.unbeaten += seconds
            self.still = 0.0 if computed != self._computed else self.still + seconds
        self._beats, self._computed = beats, computed

    def stack(self) -> str:
        """Where it is."""
        if self._task is not None:
            frames = ((frame, frame.f_lineno) for frame in self._task.get_stack())
            return "".join(traceback.StackSummary.extract(frames).format())
        thread = self._pulse.thread
        frame = sys._current_frames().get(thread.ident or 0) if thread else None
        return "".join(traceback.format_stack(frame)) if frame else ""


class Watchdog:
    """Watches parts of a service on a thread of its own.

    Time counts only as the watchdog sees it pass: while the machine or the process is suspended nothing stands still.

    Args:
        bound: seconds for which a part that is at work may show no sign of life; None: any time. A thread that computes
            may take :data:`PATIENCE_WITH_WORK` times as long.
        on_failure: called once, in any thread, when a part has failed.
    """

    def __init__(self, bound: float | None, on_failure: Callable[[], None]) -> None:
        self._bound = bound
        self._on_failure = on_failure
        self._parts: list[_Part] = []
        self._loop = Pulse()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vflow-watchdog", daemon=True)

    def watch(self, name: str, pulse: Pulse, *, computes: bool = False) -> None:
        """Watch the thread that ``pulse`` belongs to, once it has begun.

        Args:
            name: what the log calls it.
            pulse: its pulse.
            computes: whether one piece of its work may honestly compute for longer than the bound.
        """
        self._parts.append(_Part(name, pulse, computes=computes))

    def watch_task(self, name: str, task: asyncio.Task[Any], pulse: Pulse | None = None) -> None:
        """Watch a task; without a ``pulse`` only for its end."""
        self._parts.append(_Part(name, pulse or Pulse(), task))

    def start(self) -> None:
        """Begin to watch; also the event loop on which this is called."""
        self._loop.begin()
        self.watch("event loop", self._loop)
        self._beating = asyncio.create_task(self._beat_forever())
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer: from now on parts may end. Must be called on the event loop."""
        self._over.set()
        self._beating.cancel()

    def fail(self, name: str, because: str, **details: str) -> None:
        """Note that a part has failed. Only the first failure is logged, and calls ``on_failure``."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
        log.critical("a part that the service needs has failed", part=name, because=because, **details)
        self._on_failure()

    async def _beat_forever(self) -> None:
        while True:
            self._loop.beat()
            if not self._thread.is_alive():
                self.fail("watchdog", "its thread has ended")
            await asyncio.sleep(LOOK_EVERY)

    def _run(self) -> None:
        while not self._over.wait(LOOK_EVERY):
            for part in list(self._parts):
                try:
                    self._look(part)
                except Exception:  # as when memory is short; the next look may succeed
                    log.exception("the watchdog could not look", part=part.name)

    def _look(self, part: _Part) -> None:
        if part.ended:
            self.fail(part.name, "it has ended")
            return
        if self._bound is None:
            return
        part.look(LOOK_EVERY)
        if part.still > self._bound:
            self.fail(part.name, f"it has stood still for {part.still:.0f} seconds", stack=part.stack())
        elif part.unbeaten > self._bound * PATIENCE_WITH_WORK:
            self.fail(part.name, f"it has computed for {part.unbeaten:.0f} seconds", stack=part.stack())


def _computed(thread: threading.Thread | None) -> int:
    """Processor time that the thread has used, in ticks; 0 where that cannot be told."""
    if thread is None:
        return 0
    try:
        fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # there is no /proc, or no descriptor left
        return 0
    return int(fields[11]) + int(fields[12])
