"""Decides which sessions hold KV pages: when pages run short, the least recently used idle ones are offloaded.

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
from vflow_server.rpc.errors import CapacityExhausted, session_busy, session_deleted
from vflow_server.telemetry.metrics import Metrics
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import Tier, offload, restore
from vflowopt.runtime.sequence import Item, Sequence, tokens_per_stage

Evictable = Callable[[], abc.Sequence[Sequence]]
"""Returns the sequences that hold pages between two pieces of idle work. Each may be released at any time except during
a piece; the work rebuilds it."""

log = structlog.get_logger(__name__)


class KVCacheManager:
    """Manages the KV caches of all sessions of a runtime, ordered by last use.

    A session is in use while work on it is running, and idle otherwise. When pages run short, the caches of idle
    sessions are offloaded and restored with their next turn. A cache that is no longer held outside the pool is rebuilt
    from the log.

    Args:
        runtime: the model and its pool of pages.
        prefixes: the cached prefixes. They hold pages, too, and are evicted before idle sessions. Sequences of idle
            work (:meth:`lending`) are evicted first.
        offloaded: holds the caches of idle sessions that were offloaded.
        images: the pictures in the sessions' logs.
        metrics: counts evictions.
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
        """Take over the caches of ``states`` that an earlier process persisted; the most recently used come last."""
        owners = {_session(state): state for state in states}
        found = self.offloaded.recover({name: owner.sequence for name, owner in owners.items()})
        self._idle.update((owners[name], None) for name in found)
        log.info("KV caches recovered", sessions=len(found), bytes=self.offloaded.file_bytes)

    @contextmanager
    def using(self, state: SessionState) -> Iterator[None]:
        """Count ``state`` as in use within the block.

        Raises:
            ServiceError: SESSION_DELETED, or SESSION_BUSY if it is in use already.
        """
        # The event loop begins no such work; if it did, pages would be held for good.
        if state.forgotten:
            raise session_deleted(state.name)
        if state in self._in_use:
            raise session_busy(state.name)
        self._idle.pop(state, None)
        self._in_use[state] = None
        try:
            yield
        finally:
            del self._in_use[state]
            sequence = state.sequence
            self.offloaded.discard_read(sequence)
            self.offloaded.fit()
            if state.forgotten:
                self.forget(state)
            else:
                self._idle[state] = None
                self._images.note(state, sequence.log)
                state.publish()

    @contextmanager
    def lending(self, sequences: Evictable) -> Iterator[None]:
        """Let ``sequences`` hold pages within the block; they are evicted as soon as pages run short."""
        self._evictable.append(sequences)
        try:
            yield
        finally:
            self._evictable.remove(sequences)

    def find_prefix(self, tenant: str, strategy: Strategy, items: abc.Sequence[Item]) -> Sequence | None:
        """The longest prefix of ``items`` that is cached for ``tenant`` and ``strategy``; None if there is none."""
        prefix = self.prefixes.find(tenant, strategy, items)
        self._metrics.prefix(hit=prefix is not None)
        return prefix

    def release_idle(self) -> bool:
        """Free some pages that no running work needs; returns False if there are none."""
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
        """Offload idle sessions of ``tenant`` until its sessions hold at most ``most`` bytes; returns the bytes held.

        The result exceeds ``most`` if the sessions in use alone hold more.
        """
        while (held := self._held(tenant)) > most:
            if not self._offload(state for state in self._idle if state.tenant == tenant):
                break
        return held

    def _held(self, tenant: str) -> int:
        held = (state for state in (*self._idle, *self._in_use) if state.tenant == tenant)
        return sum(state.sequence.kv_bytes for state in held)

    def _offload(self, idle: Iterable[SessionState]) -> bool:
        """Offload the first of the ``idle`` sessions that holds pages; returns False if none does."""
        resident = next((state for state in idle if state.snapshot.kv_bytes), None)
        if resident is None:
            return False
        self._metrics.evicted("idle")
        log.info("offloaded the KV cache of an idle session", kv_bytes=resident.snapshot.kv_bytes)
        sequence = resident.sequence
        try:
            self.offloaded.put(sequence, offload(sequence))
        except Exception:  # such as too little memory on the host: the running turns need the pages all the same
            log.exception("a KV cache could not be offloaded; it is rebuilt from the log")
            sequence.release()
        resident.publish()
        return True

    def make_room(self, pages: int) -> bool:
        """Evict idle sequences until ``pages`` pages are free; returns False if that is not enough."""
        while pages > self._runtime.pool.free_pages:
            if not self.release_idle():
                return False
        return True

    def preempt(self, spare: Sequence) -> bool:
        """Release the youngest sequence in use that holds pages, other than ``spare``; returns False if there is none.

        It is not offloaded: a cache is offloaded only if it holds nothing but finished turns, because the running turn
        may still be rolled back.
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
        """Restore the offloaded cache of ``sequence``, if it is in memory and the sequence has nothing cached.

        Returns:
            The tier that it came from; None if nothing was restored: the cache is rebuilt from the log.

        Raises:
            PoolExhausted: too few pages are free; the cache stays offloaded.
        """
        if sequence.resident or (found := self.offloaded.find(sequence)) is None:
            return None
        offloaded, tier = found
        restored: Tier | None = tier
        try:
            restore(sequence, offloaded)
        except PoolExhausted:
            raise
        except Exception:
            log.exception("an offloaded KV cache could not be restored; it is rebuilt from the log")
            restored = None
        self.offloaded.forget(sequence)
        return restored

    def fork(self, origin: SessionState, twin: SessionState) -> None:
        """Give ``twin`` the log, the pages and the offloaded cache of ``origin``; all tensors are shared."""
        twin.continue_from(origin)
        if (found := self.offloaded.find(origin.sequence)) is not None:
            self.offloaded.put(twin.sequence, found[0])

    def forget(self, state: SessionState) -> None:
        """Release the pages, the offloaded cache and the pictures of ``state``, whose session was deleted.

        Work that is still running in it rolls back, and then releases what it took meanwhile.
        """
        state.forgotten = True
        self.offloaded.forget(state.sequence)
        self._images.forget(state)
        state.release()
        self._idle.pop(state, None)

    def persist(self, until: float) -> dict[str, Sequence]:
        """Write the caches of idle sessions to files for the next process. The engine must have stopped.

        The most recently used sessions come first, as many as fit within the bound of the files.

        Args:
            until: stop then, by ``time.monotonic()``.

        Returns:
            The sequences that are in files, by session.
        """
        room, worth = self.offloaded.fit(), list[tuple[str, Sequence]]()
        for state in reversed(self._idle):
            sequence = state.sequence
            size = sequence.kv_bytes or self.offloaded.size(sequence)
            if state.record is not None and not state.forgotten and 0 < size <= room:
                room -= size
                worth.append((_session(state), sequence))
            else:
                self.offloaded.forget(sequence)  # leaves its space to others
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
        """Release all pages. The engine must have stopped.

        Args:
            persist_until: persist caches for the next process until then, by ``time.monotonic()``; None: persist none.
        """
        persisted = {} if persist_until is None else self.persist(persist_until)
        self.prefixes.clear()
        for state in (*self._idle, *self._in_use):
            state.release()
        self.offloaded.close(persisted)

    def check(self) -> int:
        """Check that the reference count of each page equals the number of its owners.

        Returns:
            Bytes of the pages that sessions and idle work hold.

        Raises:
            AssertionError: a page is lost, or its reference count differs.
        """
        owners = [state.sequence.cache for state in (*self._idle, *self._in_use)]
        owners += [sequence.cache for sequence in self._evictables()]
        self._runtime.pool.check_integrity([*owners, *self.prefixes.caches()])
        return sum(owner.bytes_held for owner in owners)

    def check_room(self, state: SessionState, items: abc.Sequence[Item]) -> None:
        """Refuse ``items`` that could never fit behind the log of ``state``.

        Raises:
            CapacityExhausted: the sequence with ``items`` needs more pages than the pool has, or the pictures of all
                sessions would exceed their bound.
        """
        sequence = state.sequence
        self._images.check_room(state.tenant, items)
        stages = sequence.cache.stages
        tokens = tokens_per_stage([*sequence.log, *items], len(stages))
        needed = sum(stage.pages_for(count) for stage, count in zip(stages, tokens, strict=True))
        if needed > self._runtime.pool.pages:
            raise self.too_large(needed)

    def _evictables(self) -> Iterator[Sequence]:
        return (sequence for sequences in self._evictable for sequence in sequences())

    def too_large(self, pages: int) -> CapacityExhausted:
        """The error for a sequence that needs ``pages`` pages, more than the pool has."""
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
    """The name of a session with a record in the names of files: the last part of its resource name."""
    assert state.record is not None
    return state.record.facts.name.rpartition("/")[2]
