"""The engine's state of a session: its sequence, and its counts of turns and pictures.

Changed in the engine's thread only. The event loop reads :attr:`SessionState.snapshot`, which is replaced as a whole.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass

from vflow_server.store.session_record import Entry, SessionRecord
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.video import Visual
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Sequence

Placed = int | Visual | CompressedImage
"""A token, or a picture or video in its place among the tokens, compressed or not."""


@dataclass(frozen=True)
class SessionSnapshot:
    """An immutable copy of what the event loop may know of a session's state.

    Attributes:
        turns: finished turns.
        images: pictures and videos in the log.
        kv_bytes: bytes of KV cache that the session holds.
        kv_bytes_full: bytes that the same items would take without pruning.
        resident: whether any of the log is cached in the KV pool.
    """

    turns: int = 0
    images: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    resident: bool = False


class SessionState:
    """The engine's side of a session. Pictures may be added before the turn that they belong to.

    Args:
        runtime: the model.
        strategy: the strategy that compresses every picture of the session.
        tenant: the tenant. Pages and pictures are shared only with other sessions of the same tenant.
        record: the session's record in the data folder; None if the session is not stored.
        name: resource name of the session, for errors.

    Attributes:
        recalled: whether the log is in memory. The log of an earlier process is read when it is needed.
        snapshot: the latest published state.
        forgotten: whether the session was deleted, so that it must hold no memory. The event loop sets it, too.
        turns: finished turns.
        images: pictures and videos in the log.
    """

    def __init__(
        self,
        runtime: Runtime,
        strategy: Strategy,
        tenant: str,
        record: SessionRecord | None = None,
        *,
        name: str = "",
    ) -> None:
        self.name = name
        self.strategy = strategy
        self.tenant = tenant
        self.record = record
        self.recalled = True
        self.forgotten = False
        self.snapshot = SessionSnapshot()
        self.turns = 0
        self.images = 0
        self._runtime = runtime
        self._sequence: Sequence | None = None
        self._ahead: list[CompressedImage] = []
        self._items_ahead = 0

    @property
    def sequence(self) -> Sequence:
        """The session's sequence, made on first use: a stored session of another model never needs one."""
        if self._sequence is None:
            self._sequence = self._runtime.start(self.strategy)
        return self._sequence

    def picture(self, visual: Visual) -> Pieces[list[Placed]]:
        """What ``visual`` adds to the log when it is added before the next turn.

        The pieces are for any thread, and need the state as it is now.
        """
        ahead = [*self._ahead, visual]
        return _behind(self._items_ahead, self._runtime.chat.turning(self.turns, ahead, generate=False))

    def turn(self, parts: abc.Sequence[str | Visual], most: int) -> Pieces[list[Placed]]:
        """What the next turn adds to the log, without that of pictures that were added before it.

        The pieces are for any thread, and need the state as it is now. They raise TextTooLong if the texts have more
        than ``most`` tokens.
        """
        return _behind(self._items_ahead, self._runtime.chat.turning(self.turns, [*self._ahead, *parts], most=most))

    def commit_picture(self, image: CompressedImage, items: int) -> None:
        """Count ``image``, whose ``items`` items are in the log now, as added before the next turn."""
        self._ahead.append(image)
        self._items_ahead += items
        self.images += 1

    def commit_turn(self, images: int) -> None:
        """Count a finished turn with ``images`` pictures of its own."""
        self._ahead.clear()
        self._items_ahead = 0
        self.images += images
        self.turns += 1

    def continue_from(self, origin: SessionState) -> None:
        """Take over the log and the counts of ``origin``, and share its pages; this session must be new."""
        self._sequence = origin.sequence.fork()
        self._ahead = list(origin._ahead)
        self._items_ahead = origin._items_ahead
        self.turns, self.images = origin.turns, origin.images

    def resume(self, turns: int, images: int) -> None:
        """Set the counts of a session of an earlier process; :meth:`recall` takes over its log later."""
        self.turns, self.images, self.recalled = turns, images, False
        self.publish()

    def recall(self, entries: Iterable[Entry]) -> None:
        """Fill the log with the entries that an earlier process stored."""
        log = self.sequence.log
        self.turns = self.images = 0
        for entry in entries:
            log.extend(entry.items)
            if entry.answered:
                self.commit_turn(entry.images)
            else:
                for image in entry.items:
                    if isinstance(image, CompressedImage):
                        self.commit_picture(image, len(entry.items))
        self.recalled = True

    def release(self) -> None:
        """Release the KV pages; the log stays, and the next turn rebuilds the cache from it."""
        if self._sequence is not None:
            self._sequence.release()
        self.publish()

    def publish(self) -> None:
        """Publish the present state to the event loop."""
        sequence = self._sequence
        self.snapshot = SessionSnapshot(
            turns=self.turns,
            images=self.images,
            kv_bytes=sequence.kv_bytes if sequence else 0,
            kv_bytes_full=sequence.kv_bytes_full if sequence else 0,
            resident=sequence.resident if sequence else False,
        )


def _behind(items: int, pieces: Pieces[list[Placed]]) -> Pieces[list[Placed]]:
    """What ``pieces`` return, without the first ``items``."""
    return (yield from pieces)[items:]
