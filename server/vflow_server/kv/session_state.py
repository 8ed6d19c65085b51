"""The state of a session: its sequence, and where its turns begin and end.

Changed in the engine's thread only. The event loop reads :attr:`SessionState.snapshot`, which is replaced as a whole.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass

from vflow_server.store.session_record import Entry, SessionRecord
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Item, Sequence


@dataclass(frozen=True)
class SessionSnapshot:
    """What a session shows of its state: counts of finished turns and pictures, bytes of KV cache."""

    turns: int = 0
    images: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    resident: bool = False


class SessionState:
    """The engine's side of a session; pictures may be shown ahead of the turn that they belong to.

    Args:
        runtime: the model.
        strategy: compresses every picture of this session.
        tenant: whose session it is; what is computed for it is shared with that tenant's other sessions alone.
        record: what the data folder holds of it; None: nothing.

    Attributes:
        recalled: whether the log is in memory; that of an earlier process is read when it is needed.
    """

    def __init__(self, runtime: Runtime, strategy: Strategy, tenant: str, record: SessionRecord | None = None) -> None:
        self.strategy = strategy
        self.tenant = tenant
        self.record = record
        self.recalled = True
        self.snapshot = SessionSnapshot()
        self.turns = 0
        self.images = 0
        self._runtime = runtime
        self._sequence: Sequence | None = None
        self._ahead: list[CompressedImage] = []
        self._items_ahead = 0

    @property
    def sequence(self) -> Sequence:
        """The tokens and pictures of the session, begun when first asked for: sessions of another model never are."""
        if self._sequence is None:
            self._sequence = self._runtime.start(self.strategy)
        return self._sequence

    def picture(self, image: CompressedImage) -> list[Item]:
        """The items that showing ``image`` ahead of the next turn adds to the log."""
        return self._runtime.chat.turn(self.turns, [*self._ahead, image], generate=False)[self._items_ahead :]

    def turn(self, parts: abc.Sequence[str | CompressedImage]) -> list[Item]:
        """The items that the next turn adds to the log, without those of the pictures that were shown ahead of it."""
        return self._runtime.chat.turn(self.turns, [*self._ahead, *parts])[self._items_ahead :]

    def commit_picture(self, image: CompressedImage, items: int) -> None:
        """Count ``image``, whose ``items`` items are in the log now, as shown ahead of the next turn."""
        self._ahead.append(image)
        self._items_ahead += items
        self.images += 1

    def commit_turn(self, images: int) -> None:
        """Count a finished turn that brought ``images`` pictures of its own."""
        self._ahead.clear()
        self._items_ahead = 0
        self.images += images
        self.turns += 1

    def continue_from(self, origin: SessionState) -> None:
        """Take over all that was said and shown in ``origin``, sharing its pages; nothing may have been said here."""
        self._sequence = origin.sequence.fork()
        self._ahead = list(origin._ahead)
        self._items_ahead = origin._items_ahead
        self.turns, self.images = origin.turns, origin.images

    def resume(self, turns: int, images: int) -> None:
        """Count what an earlier process finished; :meth:`recall` brings the log of it."""
        self.turns, self.images, self.recalled = turns, images, False
        self.publish()

    def recall(self, entries: Iterable[Entry]) -> None:
        """Take over the log of an earlier process."""
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
        """Give back the KV pages; the log stays, and the next turn rebuilds them."""
        if self._sequence is not None:
            self._sequence.release()
        self.publish()

    def publish(self) -> None:
        """Let the event loop see the present state."""
        held = self._sequence
        self.snapshot = SessionSnapshot(
            turns=self.turns,
            images=self.images,
            kv_bytes=held.kv_bytes if held else 0,
            kv_bytes_full=held.kv_bytes_full if held else 0,
            resident=held.resident if held else False,
        )
