"""The compressed pictures in the logs of sessions, which stay in memory because KV caches are rebuilt from logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

from vflow_server.kv.session_state import SessionState
from vflow_server.rpc.errors import CapacityExhausted
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.sequence import Item


class LoggedImages:
    """Counts the bytes of these pictures and bounds them. A picture that several sessions share counts once.

    Belongs to the engine's thread.

    Args:
        most_bytes: the bound. It is checked before a picture is added, so concurrent work may exceed it a little. A
            tenant with less than an equal share may exceed it by half, so that no other can keep it out.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._of: dict[SessionState, list[CompressedImage]] = {}
        # Number of sessions by the id of the picture; ``_of`` keeps the pictures alive, so ids stay unique.
        self._holders: Counter[int] = Counter()
        self._bytes: Counter[str] = Counter()

    @property
    def bytes_held(self) -> int:
        """Bytes of all pictures that are counted."""
        return self._bytes.total()

    def note(self, state: SessionState, log: Sequence[Item]) -> None:
        """Count the pictures that are in the log of ``state`` now, instead of those counted before."""
        self.forget(state)
        self._of[state] = _distinct(log)
        for image in self._of[state]:
            self._holders[id(image)] += 1
            if self._holders[id(image)] == 1:
                self._bytes[state.tenant] += image_bytes(image)

    def forget(self, state: SessionState) -> None:
        """Stop counting the pictures of ``state``."""
        for image in self._of.pop(state, ()):
            self._holders[id(image)] -= 1
            if not self._holders[id(image)]:
                del self._holders[id(image)]
                self._bytes[state.tenant] -= image_bytes(image)
                if not self._bytes[state.tenant]:
                    del self._bytes[state.tenant]

    def check_room(self, tenant: str, items: Iterable[Item]) -> None:
        """Refuse pictures beyond the bound.

        Raises:
            CapacityExhausted: the pictures among ``items`` that are new would exceed the bound.
        """
        new = sum(image_bytes(image) for image in _distinct(items) if id(image) not in self._holders)
        if not new or self.bytes_held + new <= self._most_bytes:
            return
        share = self._most_bytes // len(self._bytes.keys() | {tenant})
        if self._bytes[tenant] + new > share or self.bytes_held + new > self._most_bytes * 3 // 2:
            raise CapacityExhausted(
                "session_pictures",
                f"the pictures of all sessions may take {self._most_bytes} bytes, which leave no room for {new} more; "
                "delete sessions, retry when idle ones have expired, or start the server with a larger "
                "--compressed-memory",
                metadata={"bytes": new, "max_bytes": self._most_bytes},
                retry_after=10.0 if new <= self._most_bytes else None,
            )


def image_bytes(image: CompressedImage) -> int:
    """Bytes of the tensors of a compressed picture."""
    layout = image.layout
    tensors: tuple[Tensor, ...] = (
        image.embeddings,
        image.positions,
        image.importance,
        image.recycled,
        *image.kept,
        layout.grid,
        layout.row,
        layout.column,
        layout.structural,
        layout.boxes,
    )
    return sum(tensor.nbytes for tensor in tensors)


def _distinct(items: Iterable[Item]) -> list[CompressedImage]:
    return list({id(item): item for item in items if isinstance(item, CompressedImage)}.values())
