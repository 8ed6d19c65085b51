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
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import Tier, offload, restore
from vflowopt.runtime.sequence import Item, Sequence, tokens_per_stage

Evictable = Callable[[], abc.Sequence[Sequence]]
"""The sequences, as they are at the time of the call, that hold pages between pieces of work in spare time. Each
may be released at any time but during such a piece; its work rebuilds it."""

log = structlog.get_logger(__name__)


class KVCacheManager:
    """The sessions on a runtime, by last use.

    A session is in use while work on it is under way. When pages run short, what idle sessions hold is offloaded and
    comes back with their next turn; what is not held outside the pool any more is rebuilt from the log.

    Args:
        runtime: whose pages are held.
        prefixes: they hold pages, too, and go before idle sessions; evictable sequences go before all.
        offloaded: where the caches of idle sessions go.
        images: the pictures in the sessions' logs.
        metrics: counts who gave way.
    """

    def __init__(
        self,
        runtime: Runtime,
        prefixes: PrefixCache,
        offloaded: OffloadStore,
        images: LoggedImages,
        metrics: Metrics,
    ) -> None:
        self._runtime = runtime
        self.prefixes = prefixes
        self.offloaded = offloaded
        self._images = images
        self._metrics = metrics
        self._in_use: OrderedDict[SessionState, None] = OrderedDict()
        self._idle: OrderedDict[SessionState, None] = OrderedDict()
        self._evictable: list[Evictable] = []

    def recover(self, states: Iterable[SessionState]) -> None:
        """Take over what an earlier process persisted of ``states``, the most recently used last."""
        owners = {_session(state): state for state in states}
        found = self.offloaded.recover({name: owner.sequence for name, owner in owners.items()})
        self._idle.update((owners[name], None) for name in found)
        log.info("KV caches recovered", sessions=len(found), bytes=self.offloaded.file_bytes)

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
            sequence = state.sequence
            self.offloaded.discard_read(sequence)
            self.offloaded.fit()
            self._images.note(state, sequence.log)
            state.publish()

    @contextmanager
    def lending(self, sequences: Evictable) -> Iterator[None]:
        """Let ``sequences`` hold pages as long as nobody else needs them."""
        self._evictable.append(sequences)
        try:
            yield
        finally:
            self._evictable.remove(sequences)

    def find_prefix(self, tenant: str, strategy: Strategy, items: abc.Sequence[Item]) -> Sequence | None:
        """The longest prefix of ``items`` that is cached for ``tenant``; None where there is none."""
        prefix = self.prefixes.find(tenant, strategy, items)
        self._metrics.prefix(hit=prefix is not None)
        return prefix

    def release_idle(self) -> bool:
        """Free some pages that no work under way needs; False when there are none."""
        for sequence in self._evictables():
            if sequence.kv_bytes:
                sequence.release()
                self._metrics.evicted("search")
                return True
        if self.prefixes.release_one():
            self._metrics.evicted("prefix")
            return True
        return self._offload(self._idle)

    def limit(self, tenant: str, most: int) -> int:
        """Offload what is idle of ``tenant`` until its sessions hold ``most`` bytes; the bytes that they hold then."""
        while (held := self._held(tenant)) > most:
            if not self._offload(state for state in self._idle if state.tenant == tenant):
                break
        return held

    def _held(self, tenant: str) -> int:
        held = (state for state in (*self._idle, *self._in_use) if state.tenant == tenant)
        return sum(state.sequence.kv_bytes for state in held)

    def _offload(self, idle: Iterable[SessionState]) -> bool:
        """Offload the first of the ``idle`` sessions that holds pages; False if none does."""
        resident = next((state for state in idle if state.snapshot.kv_bytes), None)
        if resident is None:
            return False
        self._metrics.evicted("idle")
        log.info("offloaded the KV cache of an idle session", kv_bytes=resident.snapshot.kv_bytes)
        sequence = resident.sequence
        self.offloaded.put(sequence, offload(sequence))
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

        It is not offloaded: only a cache of finished turns alone stays true whatever becomes of this one.
        """
        for state in reversed(self._in_use):
            sequence = state.sequence
            if sequence is not spare and sequence.kv_bytes:
                self._metrics.evicted("running")
                log.info("preempted a running turn", kv_bytes=sequence.kv_bytes)
                sequence.release()
                return True
        return False

    def restore(self, sequence: Sequence) -> Tier | None:
        """Bring back what was offloaded of a sequence, if that is in memory and the sequence has nothing cached.

        Returns:
            Where it came back from; None if it did not.

        Raises:
            PoolExhausted: too few pages are free; it stays offloaded.
        """
        if sequence.resident or (found := self.offloaded.find(sequence)) is None:
            return None
        offloaded, tier = found
        restore(sequence, offloaded)
        self.offloaded.forget(sequence)
        return tier

    def fork(self, origin: SessionState, twin: SessionState) -> None:
        """Give ``twin`` the past of ``origin``, and its offloaded cache. Pages and tensors are shared, not copied."""
        twin.continue_from(origin)
        if (found := self.offloaded.find(origin.sequence)) is not None:
            self.offloaded.put(twin.sequence, found[0])

    def forget(self, state: SessionState) -> None:
        """Release all that is held of ``state`` for good."""
        self.offloaded.forget(state.sequence)
        self._images.forget(state)
        state.release()
        self._idle.pop(state, None)

    def persist(self, until: float) -> dict[str, Sequence]:
        """Put what idle sessions hold into files, for the next process, once no work is done any more.

        Those used last come first, as many as the files have room for, and until the monotonic clock says ``until``.

        Returns:
            The sequences in files, by session.
        """
        room, worth = self.offloaded.fit(), list[tuple[str, Sequence]]()
        for state in reversed(self._idle):
            sequence = state.sequence
            size = sequence.kv_bytes or self.offloaded.size(sequence)
            if state.record is not None and 0 < size <= room:
                room -= size
                worth.append((_session(state), sequence))
            else:
                self.offloaded.forget(sequence)  # gives its room to others
        persisted: dict[str, Sequence] = {}
        for session, sequence in worth:
            offloaded = offload(sequence) if sequence.resident and time.monotonic() < until else None
            if self.offloaded.file(sequence, offloaded, until):
                persisted[session] = sequence
        log.info(
            "persisted KV caches for the next process",
            sessions=len(persisted),
            without=len(self._idle) - len(persisted),
        )
        return persisted

    def close(self, persist_until: float | None = None) -> None:
        """Give back all pages, once no work is done any more.

        Args:
            persist_until: by the monotonic clock, until when to put KV caches into files for the next process; None:
                none are put there.
        """
        persisted = {} if persist_until is None else self.persist(persist_until)
        self.prefixes.clear()
        for state in (*self._idle, *self._in_use):
            state.release()
        self.offloaded.close(persisted)

    def check(self) -> int:
        """Bytes of the pages that sessions hold, after proving that each page is held as often as it has owners.

        Raises:
            AssertionError: a page is lost, or its references and its owners differ.
        """
        owners = [state.sequence.cache for state in (*self._idle, *self._in_use)]
        owners += [sequence.cache for sequence in self._evictables()]
        self._runtime.pool.check_integrity([*owners, *self.prefixes.caches()])
        return sum(owner.bytes_held for owner in owners)

    def check_room(self, sequence: Sequence, items: abc.Sequence[Item]) -> None:
        """Refuse at once what the pool could not hold even if there were nobody else, and pictures that are too many.

        Raises:
            CapacityExhausted: the sequence with ``items`` needs more pages than there are, or the pictures of all
                sequences more memory than they may have.
        """
        self._images.check_room(items)
        stages = sequence.cache.stages
        tokens = tokens_per_stage([*sequence.log, *items], len(stages))
        needed = sum(stage.pages_for(count) for stage, count in zip(stages, tokens, strict=True))
        if needed > self._runtime.pool.pages:
            raise self.too_large(needed)

    def _evictables(self) -> Iterator[Sequence]:
        return (sequence for sequences in self._evictable for sequence in sequences())

    def too_large(self, pages: int) -> CapacityExhausted:
        """The refusal of a sequence that alone needs ``pages`` pages and can never have them."""
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
