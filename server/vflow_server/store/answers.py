"""Answers of finished turns, and receipts of pictures, by request_id, so that nothing is done twice (AIP-155)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from vflow_client.v1 import conversations_pb2
from vflow_server.rpc.errors import InvalidRequest

REMEMBERED = 16
"""Number of answers of a session that are stored."""


@dataclass(frozen=True)
class StoredAnswer:
    """The answer to a turn or a picture, and the request that it answers.

    Attributes:
        request_id: the request's id, chosen by the client.
        fingerprint: digest of the request's content.
        finished: the answer, as the contract's message; for a picture it has nothing but the receipt.
    """

    request_id: str
    fingerprint: str
    finished: conversations_pb2.Finished


class AnswerCache:
    """The latest answers of one session. Belongs to the event loop's thread.

    Args:
        answers: answers that are stored already, oldest first.
    """

    def __init__(self, answers: Iterable[StoredAnswer] = ()) -> None:
        self._answers: OrderedDict[str, StoredAnswer] = OrderedDict()
        for answer in answers:
            self.put(answer)

    def find(self, request_id: str, fingerprint: str) -> conversations_pb2.Finished | None:
        """The stored answer to a request, marked as replayed; None if the request is new.

        Args:
            request_id: the request's id; an empty one matches nothing.
            fingerprint: digest of the request's content.

        Raises:
            InvalidRequest: REQUEST_ID_REUSED if an earlier request with other content had the same request_id.
        """
        if not request_id or request_id not in self._answers:
            return None
        answer = self._answers[request_id]
        if answer.fingerprint != fingerprint:
            raise InvalidRequest(
                "REQUEST_ID_REUSED",
                "request_id",
                f"request_id {request_id!r} belongs to an earlier request with other content; choose a new one",
                metadata={"request_id": request_id},
            )
        replay = conversations_pb2.Finished()
        replay.CopyFrom(answer.finished)
        replay.receipt.replayed = True
        return replay

    def put(self, answer: StoredAnswer) -> None:
        """Store an answer; the oldest one is dropped when there are too many."""
        self._answers[answer.request_id] = answer
        while len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)
