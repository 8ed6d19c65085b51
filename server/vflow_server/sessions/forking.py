"""A forking: a second dialogue from the same past, as work for the engine."""

from __future__ import annotations

from collections.abc import Callable

from vflow_server.engine.engine import Steps
from vflow_server.engine.workbench import Workbench
from vflow_server.kv.session_state import SessionState
from vflow_server.sessions.reading import read_parked
from vflow_server.sessions.recording import recall, write_fork


class Forking:
    """The work of giving a new dialogue the past of another. Emits nothing and returns nothing.

    Args:
        bench: the engine's things.
        origin: whose past it is; nothing else may be under way in it.
        twin: gets it; new and unused.
    """

    def __init__(self, bench: Workbench, origin: SessionState, twin: SessionState) -> None:
        self._bench = bench
        self._origin = origin
        self._twin = twin

    def __call__(self, emit: Callable[[object], None]) -> Steps[None]:
        """The steps of the forking."""
        kv = self._bench.kv
        with kv.using(self._origin), kv.using(self._twin):
            yield from recall(self._bench, self._origin)
            yield from write_fork(self._origin.record, self._twin.record)
            yield from read_parked(self._bench, self._origin.sequence(self._bench.runtime))
            kv.fork(self._origin, self._twin)
