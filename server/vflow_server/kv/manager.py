"""Which sessions hold KV pages, and which of them go when pages run short: the least recently used idle ones.

Belongs to the engine's thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict, abc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import structlog

from vflow_server.kv.logged_images import LoggedImages
from vflow_server.kv.offload import OffloadStore
from vflow_server.kv.prefix_cache import PrefixCache
from vflow_server.kv.session_state import SessionState
from vflow_server.rpc.errors import CapacityExhausted
from vflow_server.telemetry.metrics import Metrics
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import Tier, offload, restore
from vflowopt.runtime.sequence import Item, Sequence, tokens_per_stage

Evictable = Callable[[], abc.Sequence[Sequence]]
"""The sequences, as they are at the time of the call, that hold pages between pieces of work in spare time. Each
may be released at any time but during such a piece; its work rebuilds it."""

log = structlog.get_logger(__name__)


class KVCacheManager:
    """The sessions on a runtime, by last use.

    A session is in use while work on it is under way. What idle ones hold is parked outside the pool when pages run
    short, and comes back with their next turn; what is not held there any more is rebuilt from the log.

    Args:
        runtime: whose pages are held.
        prefixes: they hold pages, too, and go before idle sessions; what is on loan goes before all.
        offloaded: where the caches of idle sessions go.
        pictures: those in the sessions' logs.
        metrics: counts who gave way.
    """

    def __init__(
        self,
        runtime: Runtime,
        prefixes: PrefixCache,
        offloaded: OffloadStore,
        pictures: LoggedImages,
        metrics: Metrics,
    ) -> None:
        self._runtime = runtime
        self._prefixes = prefixes
        self._offloaded = offloaded
        self._pictures = pictures
        self._metrics = metrics
        self._in_use: OrderedDict[SessionState, None] = OrderedDict()
        self._idle: OrderedDict[SessionState, None] = OrderedDict()
        self._loans: list[Evictable] = []

    def recover(self, states: Iterable[SessionState]) -> None:
        """Take over what an earlier process kept of ``states``, the most recently used last."""
        owners = {_session(state): state for state in states}
        found = self._offloaded.recover({name: owner.sequence(self._runtime) for name, owner in owners.items()})
        self._idle.update((owners[name], None) for name in found)
        log.info("KV caches recovered", sessions=len(found), bytes=self._offloaded.file_bytes)

    @contextmanager
    def using(self, state: SessionState) -> Iterator[None]:
        """Count ``state`` as in use while work on it is under way."""
        self._idle.pop(state, None)
        self._in_use[state] = None
        try:
            yield
        finally:
            del self._in_use[state]
            self._idle[state] = None
            sequence = state.sequence(self._runtime)
            self._offloaded.put_down(sequence)
            self._offloaded.fit()
            self._pictures.note(state, sequence.log)
            state.publish()

    @contextmanager
    def lending(self, loan: Evictable) -> Iterator[None]:
        """Let the sequences of ``loan`` hold pages as long as nobody else needs them."""
        self._loans.append(loan)
        try:
            yield
        finally:
            self._loans.remove(loan)

    def release_idle(self) -> bool:
        """Free some pages that no work under way needs; False when there are none."""
        for sequence in self._on_loan():
            if sequence.kv_bytes:
                sequence.release()
                self._metrics.evicted("search")
                return True
        if self._prefixes.release_one():
            self._metrics.evicted("prefix")
            return True
        return self._park(self._idle)

    def limit(self, tenant: str, most: int) -> int:
        """Park what is idle of ``tenant`` until its sessions hold ``most`` bytes; the bytes that they hold then."""
        while (held := self._held(tenant)) > most:
            if not self._park(state for state in self._idle if state.tenant == tenant):
                break
        return held

    def _held(self, tenant: str) -> int:
        held = (state for state in (*self._idle, *self._in_use) if state.tenant == tenant)
        return sum(state.sequence(self._runtime).kv_bytes for state in held)

    def _park(self, idle: Iterable[SessionState]) -> bool:
        """Park the first of the ``idle`` sessions that holds pages; False if none does."""
        resident = next((state for state in idle if state.snapshot.kv_bytes), None)
        if resident is None:
            return False
        self._metrics.evicted("idle")
        log.info("parked the KV cache of an idle session", kv_bytes=resident.snapshot.kv_bytes)
        sequence = resident.sequence(self._runtime)
        self._offloaded.put(sequence, offload(sequence))
        resident.publish()
        return True

    def make_room(self, pages: int) -> bool:
        """Have what is idle give way until ``pages`` are free; False if that does not suffice."""
        while pages > self._runtime.pool.free_pages:
            if not self.release_idle():
                return False
        return True

    def preempt(self, spare: Sequence) -> bool:
        """Release the sequence in use that began last and holds pages, but not ``spare``; False if none does.

        It is not parked: only a cache that covers nothing but finished turns stays true whatever becomes of this one.
        """
        for state in reversed(self._in_use):
            sequence = state.sequence(self._runtime)
            if sequence is not spare and sequence.kv_bytes:
                self._metrics.evicted("running")
                log.info("preempted a running turn", kv_bytes=sequence.kv_bytes)
                sequence.release()
                return True
        return False

    def restore(self, sequence: Sequence) -> Tier | None:
        """Bring back what was parked of a sequence, if anything is at hand and it has nothing cached.

        Returns:
            From where it came back; None if it did not.

        Raises:
            PoolExhausted: too few pages are free; it stays parked.
        """
        if sequence.resident or (found := self._offloaded.find(sequence)) is None:
            return None
        offloaded, tier = found
        restore(sequence, offloaded)
        self._offloaded.forget(sequence)
        return tier

    def fork(self, origin: SessionState, twin: SessionState) -> None:
        """Give ``twin`` the past of ``origin``, and what is parked of it. Pages and tensors are shared, not copied."""
        twin.continue_from(origin, self._runtime)
        if (found := self._offloaded.find(origin.sequence(self._runtime))) is not None:
            self._offloaded.put(twin.sequence(self._runtime), found[0])

    def forget(self, state: SessionState) -> None:
        """Release all that is held of ``state`` for good."""
        self._offloaded.forget(state.sequence(self._runtime))
        self._pictures.forget(state)
        state.release()
        self._idle.pop(state, None)

    def keep(self, until: float) -> dict[str, Sequence]:
        """Have what idle sessions hold in files, for the next process, once no work is done any more.

        Those used last come first, as many as the files have room for, and until the monotonic clock says ``until``.

        Returns:
            The sequences in files, by session.
        """
        room, worth = self._offloaded.fit(), list[tuple[str, Sequence]]()
        for state in reversed(self._idle):
            sequence = state.sequence(self._runtime)
            size = sequence.kv_bytes or self._offloaded.size(sequence)
            if state.record is not None and 0 < size <= room:
                room -= size
                worth.append((_session(state), sequence))
            else:
                self._offloaded.forget(sequence)  # gives its room to others
        kept: dict[str, Sequence] = {}
        for session, sequence in worth:
            offloaded = offload(sequence) if sequence.resident and time.monotonic() < until else None
            if self._offloaded.file(sequence, offloaded, until):
                kept[session] = sequence
        log.info("kept KV caches for the next process", sessions=len(kept), without=len(self._idle) - len(kept))
        return kept

    def release_all(self) -> None:
        """Give back all pages, once no work is done any more."""
        for state in (*self._idle, *self._in_use):
            state.release()

    def check(self) -> int:
        """Bytes of the pages that sessions hold, after proving that each page is held as often as it has owners.

        Raises:
            AssertionError: a page is lost, or its references and its owners differ.
        """
        owners = [state.sequence(self._runtime).cache for state in (*self._idle, *self._in_use)]
        owners += [sequence.cache for sequence in self._on_loan()]
        self._runtime.pool.check_integrity([*owners, *self._prefixes.caches()])
        return sum(owner.bytes_held for owner in owners)

    def check_room(self, sequence: Sequence, items: abc.Sequence[Item]) -> None:
        """Refuse at once what the pool could not hold even if there were nobody else, and pictures that are too many.

        Raises:
            CapacityExhausted: the sequence with ``items`` needs more pages than there are, or the pictures of all
                sequences more memory than they may have.
        """
        self._pictures.check_room(items)
        stages = sequence.cache.stages
        tokens = tokens_per_stage([*sequence.log, *items], len(stages))
        needed = sum(stage.pages_for(count) for stage, count in zip(stages, tokens, strict=True))
        if needed > self._runtime.pool.pages:
            raise self.too_large(needed)

    def _on_loan(self) -> Iterator[Sequence]:
        return (sequence for loan in self._loans for sequence in loan())

    def too_large(self, pages: int) -> CapacityExhausted:
        """What to tell whose sequence alone needs ``pages`` pages and can never have them."""
        pool = self._runtime.pool
        return CapacityExhausted(
            "kv_cache",
            f"this conversation alone needs {pages * pool.page_bytes} bytes of KV cache and the server has "
            f"{pool.bytes_total}, so that waiting does not help: begin a new session, choose a strategy that keeps "
            "less, or start the server with a larger --kv-budget",
            metadata={"kv_budget": pool.bytes_total, "kv_bytes_needed": pages * pool.page_bytes},
            retry_after=None,
        )


def _session(state: SessionState) -> str:
    """Under which the files of a session that has a record are known: the last part of its session's name."""
    assert state.record is not None
    return state.record.facts.name.rpartition("/")[2]
