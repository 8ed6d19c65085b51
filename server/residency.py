"""Which dialogues hold KV pages, and which of them go when pages run short: the least recently used idle ones.

Belongs to the engine's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import structlog

from vflow_server.dialogue import Dialogue
from vflow_server.errors import CapacityExhausted
from vflowopt.cache import PoolExhausted
from vflowopt.runtime import Runtime

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Residency:
    """The dialogues on a runtime, by last use.

    A dialogue is in use while work on it is under way; its pages are then never taken from it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._in_use: set[Dialogue] = set()
        self._idle: OrderedDict[Dialogue, None] = OrderedDict()

    @contextmanager
    def using(self, dialogue: Dialogue) -> Iterator[None]:
        """Protect the pages of ``dialogue`` while work on it is under way."""
        self._idle.pop(dialogue, None)
        self._in_use.add(dialogue)
        try:
            yield
        finally:
            self._in_use.remove(dialogue)
            self._idle[dialogue] = None
            dialogue.publish()

    def with_room(self, action: Callable[[], T]) -> T:
        """Do ``action``, which must change nothing where pages run short, releasing idle dialogues until it succeeds.

        Raises:
            CapacityExhausted: pages are short though every idle dialogue was released.
        """
        while True:
            try:
                return action()
            except PoolExhausted as shortage:
                if not self._release_one():
                    raise self._refusal(shortage) from None

    def forget(self, dialogue: Dialogue) -> None:
        """Release the pages of ``dialogue`` for good."""
        dialogue.release()
        self._idle.pop(dialogue, None)

    def check(self) -> int:
        """Bytes of all pages held, after proving that each page has exactly one owner or none.

        Raises:
            AssertionError: a page is lost, or owned twice.
        """
        owners = [dialogue.conversation(self._runtime).cache for dialogue in (*self._idle, *self._in_use)]
        self._runtime.pool.check_integrity(owners)
        return self._runtime.pool.bytes_used

    def _release_one(self) -> bool:
        resident = next((dialogue for dialogue in self._idle if dialogue.state.kv_bytes), None)
        if resident is None:
            return False
        log.info("released the KV cache of an idle session", kv_bytes=resident.state.kv_bytes)
        resident.release()
        return True

    def _refusal(self, shortage: PoolExhausted) -> CapacityExhausted:
        alone = len(self._in_use) == 1
        budget = self._runtime.pool.bytes_total
        remedy = (
            "this conversation alone needs more: begin a new session, choose a strategy that keeps less, "
            "or start the server with a larger --kv-budget"
            if alone
            else "other conversations hold it: retry in a moment"
        )
        return CapacityExhausted(
            "kv_cache",
            f"the KV cache of {budget} bytes is full; {remedy}",
            metadata={"kv_budget": budget, "pages_needed": shortage.needed, "pages_free": shortage.free},
            retry_after=None if alone else 1.0,
        )
