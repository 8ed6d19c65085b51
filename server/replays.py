"""Answers of finished turns by request_id, so that a retried turn is answered and not said twice (AIP-155)."""

from __future__ import annotations

from collections import OrderedDict

from vflow.v1 import conversations_pb2
from vflow_server.errors import InvalidRequest

REMEMBERED = 16
"""Turns of a session whose answers are kept."""


class Replays:
    """The latest answers of one session. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, tuple[str, conversations_pb2.Finished]] = OrderedDict()

    def find(self, request_id: str, fingerprint: str) -> conversations_pb2.Finished | None:
        """The stored answer to the request, marked as replayed; None if it is new.

        Args:
            request_id: chosen by the client; empty matches nothing.
            fingerprint: digest of the request's content.

        Raises:
            InvalidRequest: REQUEST_ID_REUSED where the request_id came with other content.
        """
        if not request_id or request_id not in self._answers:
            return None
        earlier, answer = self._answers[request_id]
        if earlier != fingerprint:
            raise InvalidRequest(
                "REQUEST_ID_REUSED",
                "request_id",
                f"request_id {request_id!r} belongs to an earlier turn with other content; choose a new one",
                metadata={"request_id": request_id},
            )
        replay = conversations_pb2.Finished()
        replay.CopyFrom(answer)
        replay.receipt.replayed = True
        return replay

    def keep(self, request_id: str, fingerprint: str, answer: conversations_pb2.Finished) -> None:
        """Remember an answer; the oldest goes when there are too many."""
        if request_id:
            self._answers[request_id] = (fingerprint, answer)
            while len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)
