"""Which dialogues hold KV pages, and which of them go when pages run short: the least recently used idle ones.

Belongs to the engine's thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import structlog

from vflow_server.kv.logged_images import LoggedPictures
from vflow_server.kv.offload import ParkedStore, Tier
from vflow_server.kv.prefix_cache import PrefixStore
from vflow_server.kv.session_log import Dialogue
from vflow_server.rpc.errors import CapacityExhausted
from vflow_server.telemetry.metrics import Metrics
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import park, unpark
from vflowopt.runtime.sequence import Conversation, Item, tokens_per_stage

Loan = Callable[[], Sequence[Conversation]]
"""The conversations, as they are at the time of the call, that hold pages between pieces of work in spare time. Each
may be released at any time but during such a piece; its work rebuilds it."""

log = structlog.get_logger(__name__)


class Residency:
    """The dialogues on a runtime, by last use.

    A dialogue is in use while work on it is under way. What idle ones hold is parked outside the pool when pages run
    short, and comes back with their next turn; what is not held there any more is rebuilt from the log.

    Args:
        runtime: whose pages are held.
        prefixes: they hold pages, too, and go before idle dialogues; what is on loan goes before all.
        parked: where the caches of idle dialogues go.
        pictures: those in the dialogues' logs.
        metrics: counts who gave way.
    """

    def __init__(
        self,
        runtime: Runtime,
        prefixes: PrefixStore,
        parked: ParkedStore,
        pictures: LoggedPictures,
        metrics: Metrics,
    ) -> None:
        self._runtime = runtime
        self._prefixes = prefixes
        self._parked = parked
        self._pictures = pictures
        self._metrics = metrics
        self._in_use: OrderedDict[Dialogue, None] = OrderedDict()
        self._idle: OrderedDict[Dialogue, None] = OrderedDict()
        self._loans: list[Loan] = []

    def recover(self, dialogues: Iterable[Dialogue]) -> None:
        """Take over what an earlier process kept of ``dialogues``, the most recently used last."""
        owners = {_session(dialogue): dialogue for dialogue in dialogues}
        found = self._parked.recover({name: owner.conversation(self._runtime) for name, owner in owners.items()})
        self._idle.update((owners[name], None) for name in found)
        log.info("KV caches recovered", sessions=len(found), bytes=self._parked.file_bytes)

    @contextmanager
    def using(self, dialogue: Dialogue) -> Iterator[None]:
        """Count ``dialogue`` as in use while work on it is under way."""
        self._idle.pop(dialogue, None)
        self._in_use[dialogue] = None
        try:
            yield
        finally:
            del self._in_use[dialogue]
            self._idle[dialogue] = None
            conversation = dialogue.conversation(self._runtime)
            self._parked.put_down(conversation)
            self._parked.fit()
            self._pictures.note(dialogue, conversation.log)
            dialogue.publish()

    @contextmanager
    def lending(self, loan: Loan) -> Iterator[None]:
        """Let the conversations of ``loan`` hold pages as long as nobody else needs them."""
        self._loans.append(loan)
        try:
            yield
        finally:
            self._loans.remove(loan)

    def release_idle(self) -> bool:
        """Free some pages that no work under way needs; False when there are none."""
        for conversation in self._on_loan():
            if conversation.kv_bytes:
                conversation.release()
                self._metrics.evicted("search")
                return True
        if self._prefixes.release_one():
            self._metrics.evicted("prefix")
            return True
        return self._park(self._idle)

    def limit(self, tenant: str, most: int) -> int:
        """Park what is idle of ``tenant`` until its dialogues hold ``most`` bytes; the bytes that they hold then."""
        while (held := self._held(tenant)) > most:
            if not self._park(dialogue for dialogue in self._idle if dialogue.tenant == tenant):
                break
        return held

    def _held(self, tenant: str) -> int:
        held = (dialogue for dialogue in (*self._idle, *self._in_use) if dialogue.tenant == tenant)
        return sum(dialogue.conversation(self._runtime).kv_bytes for dialogue in held)

    def _park(self, idle: Iterable[Dialogue]) -> bool:
        """Park the first of the ``idle`` dialogues that holds pages; False if none does."""
        resident = next((dialogue for dialogue in idle if dialogue.state.kv_bytes), None)
        if resident is None:
            return False
        self._metrics.evicted("idle")
        log.info("parked the KV cache of an idle session", kv_bytes=resident.state.kv_bytes)
        conversation = resident.conversation(self._runtime)
        self._parked.put(conversation, park(conversation))
        resident.publish()
        return True

    def make_room(self, pages: int) -> bool:
        """Have what is idle give way until ``pages`` are free; False if that does not suffice."""
        while pages > self._runtime.pool.free_pages:
            if not self.release_idle():
                return False
        return True

    def preempt(self, spare: Conversation) -> bool:
        """Release the conversation in use that began last and holds pages, but not ``spare``; False if none does.

        It is not parked: only a cache that covers nothing but finished turns stays true whatever becomes of this one.
        """
        for dialogue in reversed(self._in_use):
            conversation = dialogue.conversation(self._runtime)
            if conversation is not spare and conversation.kv_bytes:
                self._metrics.evicted("running")
                log.info("preempted a running turn", kv_bytes=conversation.kv_bytes)
                conversation.release()
                return True
        return False

    def restore(self, conversation: Conversation) -> Tier | None:
        """Bring back what was parked of a conversation, if anything is at hand and it has nothing cached.

        Returns:
            From where it came back; None if it did not.

        Raises:
            PoolExhausted: too few pages are free; it stays parked.
        """
        if conversation.resident or (found := self._parked.find(conversation)) is None:
            return None
        parked, tier = found
        unpark(conversation, parked)
        self._parked.forget(conversation)
        return tier

    def fork(self, origin: Dialogue, twin: Dialogue) -> None:
        """Give ``twin`` the past of ``origin``, and what is parked of it. Pages and tensors are shared, not copied."""
        twin.continue_from(origin, self._runtime)
        if (found := self._parked.find(origin.conversation(self._runtime))) is not None:
            self._parked.put(twin.conversation(self._runtime), found[0])

    def forget(self, dialogue: Dialogue) -> None:
        """Release all that is held of ``dialogue`` for good."""
        self._parked.forget(dialogue.conversation(self._runtime))
        self._pictures.forget(dialogue)
        dialogue.release()
        self._idle.pop(dialogue, None)

    def keep(self, until: float) -> dict[str, Conversation]:
        """Have what idle dialogues hold in files, for the next process, once no work is done any more.

        Those used last come first, as many as the files have room for, and until the monotonic clock says ``until``.

        Returns:
            The conversations in files, by session.
        """
        room, worth = self._parked.fit(), list[tuple[str, Conversation]]()
        for dialogue in reversed(self._idle):
            conversation = dialogue.conversation(self._runtime)
            size = conversation.kv_bytes or self._parked.size(conversation)
            if dialogue.record is not None and 0 < size <= room:
                room -= size
                worth.append((_session(dialogue), conversation))
            else:
                self._parked.forget(conversation)  # gives its room to others
        kept: dict[str, Conversation] = {}
        for session, conversation in worth:
            parked = park(conversation) if conversation.resident and time.monotonic() < until else None
            if self._parked.file(conversation, parked, until):
                kept[session] = conversation
        log.info("kept KV caches for the next process", sessions=len(kept), without=len(self._idle) - len(kept))
        return kept

    def release_all(self) -> None:
        """Give back all pages, once no work is done any more."""
        for dialogue in (*self._idle, *self._in_use):
            dialogue.release()

    def check(self) -> int:
        """Bytes of the pages that dialogues hold, after proving that each page is held as often as it has owners.

        Raises:
            AssertionError: a page is lost, or its references and its owners differ.
        """
        owners = [dialogue.conversation(self._runtime).cache for dialogue in (*self._idle, *self._in_use)]
        owners += [conversation.cache for conversation in self._on_loan()]
        self._runtime.pool.check_integrity([*owners, *self._prefixes.caches()])
        return sum(owner.bytes_held for owner in owners)

    def check_room(self, conversation: Conversation, items: Sequence[Item]) -> None:
        """Refuse at once what the pool could not hold even if there were nobody else, and pictures that are too many.

        Raises:
            CapacityExhausted: the conversation with ``items`` needs more pages than there are, or the pictures of all
                conversations more memory than they may have.
        """
        self._pictures.check_room(items)
        stages = conversation.cache.stages
        tokens = tokens_per_stage([*conversation.log, *items], len(stages))
        needed = sum(stage.pages_for(count) for stage, count in zip(stages, tokens, strict=True))
        if needed > self._runtime.pool.pages:
            raise self.too_large(needed)

    def _on_loan(self) -> Iterator[Conversation]:
        return (conversation for loan in self._loans for conversation in loan())

    def too_large(self, pages: int) -> CapacityExhausted:
        """What to tell whose conversation alone needs ``pages`` pages and can never have them."""
        pool = self._runtime.pool
        return CapacityExhausted(
            "kv_cache",
            f"this conversation alone needs {pages * pool.page_bytes} bytes of KV cache and the server has "
            f"{pool.bytes_total}, so that waiting does not help: begin a new session, choose a strategy that keeps "
            "less, or start the server with a larger --kv-budget",
            metadata={"kv_budget": pool.bytes_total, "kv_bytes_needed": pages * pool.page_bytes},
            retry_after=None,
        )


def _session(dialogue: Dialogue) -> str:
    """Under which the files of a dialogue that has a record are known: the last part of its session's name."""
    assert dialogue.record is not None
    return dialogue.record.facts.name.rpartition("/")[2]
