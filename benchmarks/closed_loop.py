"""A closed loop: a fixed number of conversations at once; each sends its next turn when the last one is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from benchmarks.chat import Chat
from benchmarks.system import OpenChat, Reply, System


@dataclass(frozen=True)
class Held:
    """The measurements of a closed loop.

    Attributes:
        seconds: from the first turn of all to the end of the last.
        conversations: the replies of each conversation, turn by turn.
        resident_bytes: memory of the system while the last conversations were still open; None if it is unknown.
    """

    seconds: float
    conversations: Sequence[Sequence[Reply]]
    resident_bytes: int | None

    @property
    def turns(self) -> int:
        """Turns in all."""
        return sum(map(len, self.conversations))

    @property
    def tokens(self) -> int:
        """New tokens in all."""
        return sum(reply.tokens for replies in self.conversations for reply in replies)


def hold(system: System, chats: Sequence[Chat], at_once: int, on_turn: Callable[[], object]) -> Held:
    """Hold all of ``chats``, ``at_once`` at a time.

    Args:
        system: the system that answers.
        chats: at least ``at_once``.
        at_once: conversations at once; when one ends, the next begins.
        on_turn: called after every turn, from any thread.

    Raises:
        RuntimeError: the system failed.
    """
    waiting: SimpleQueue[Chat] = SimpleQueue()
    for chat in chats:
        waiting.put(chat)
    last: list[OpenChat] = []
    held: list[list[Reply]] = []
    start = threading.Barrier(at_once)

    def converse() -> float:
        start.wait()
        begun = time.perf_counter()
        current: OpenChat | None = None
        with suppress(Empty):
            while chat := waiting.get_nowait():
                if current is not None:
                    current.close()
                current = system.open(chat)
                replies: list[Reply] = []
                held.append(replies)
                for question in chat.questions:
                    replies.append(current.say(question))
                    on_turn()
        if current is not None:
            last.append(current)
        return begun

    with ThreadPoolExecutor(at_once) as threads:
        begins = [future.result() for future in [threads.submit(converse) for _ in range(at_once)]]
    ended = time.perf_counter()
    resident = system.resident_bytes()
    for each in last:
        each.close()
    return Held(ended - min(begins), held, resident)
