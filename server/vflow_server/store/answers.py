"""Answers of finished turns by request_id, so that a retried turn is answered and not said twice (AIP-155)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from vflow_client.v1 import conversations_pb2
from vflow_server.rpc.errors import InvalidRequest

REMEMBERED = 16
"""Turns of a session whose answers are kept."""


@dataclass(frozen=True)
class StoredAnswer:
    """The end of a turn, and what it was the answer to.

    Attributes:
        request_id: chosen by the client.
        fingerprint: digest of the request's content.
        finished: the contract's message.
    """

    request_id: str
    fingerprint: str
    finished: conversations_pb2.Finished


class AnswerCache:
    """The latest answers of one session. Belongs to the event loop's thread.

    Args:
        answers: those that are known already, oldest first.
    """

    def __init__(self, answers: Iterable[StoredAnswer] = ()) -> None:
        self._answers: OrderedDict[str, StoredAnswer] = OrderedDict()
        for answer in answers:
            self.put(answer)

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
        answer = self._answers[request_id]
        if answer.fingerprint != fingerprint:
            raise InvalidRequest(
                "REQUEST_ID_REUSED",
                "request_id",
                f"request_id {request_id!r} belongs to an earlier turn with other content; choose a new one",
                metadata={"request_id": request_id},
            )
        replay = conversations_pb2.Finished()
        replay.CopyFrom(answer.finished)
        replay.receipt.replayed = True
        return replay

    def put(self, answer: StoredAnswer) -> None:
        """Remember an answer; the oldest goes when there are too many."""
        self._answers[answer.request_id] = answer
        while len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)
