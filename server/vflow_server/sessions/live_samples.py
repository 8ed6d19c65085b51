"""Pictures and questions of conversations that were held lately, kept in memory for whoever calibrates on them.

Only where the operator opted in; videos are not kept. Belongs to the event loop's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from vflow_server.rpc.errors import ServiceError
from vflowopt.media.picture import Picture
from vflowopt.media.video import Visual
from vflowopt.search.calibration import Sample

MOST_QUESTIONS = 8
"""Questions that are kept of a conversation."""


@dataclass
class _Conversation:
    """What was heard of a conversation about one picture: the questions of its turns, from the first one on."""

    picture: Picture
    questions: list[str] = field(default_factory=list)
    over: bool = False


class LiveSamples:
    """The latest conversations about one picture, by tenant; each counts up to the moment when more is shown.

    Args:
        most: conversations to keep; 0 keeps none.
        most_bytes: of their decoded pictures.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        # By tenant and session; whose last turn is the latest comes last.
        self._conversations: OrderedDict[tuple[str, str], _Conversation] = OrderedDict()

    def __len__(self) -> int:
        """How many conversations are kept, of all tenants."""
        return len(self._conversations)

    def note_image(self, tenant: str, session: str, visual: Visual, *, images: int) -> None:
        """Hear that ``visual`` was shown ahead of a turn of ``session``, in which there are ``images`` by now."""
        if images == 1 and isinstance(visual, Picture):
            self._put((tenant, session), _Conversation(visual))
        elif (conversation := self._conversations.get((tenant, session))) is not None:
            conversation.over = True

    def note_turn(self, tenant: str, session: str, parts: Sequence[str | Visual], *, turns: int, images: int) -> None:
        """Hear of a finished turn of ``session``, in which there are so many ``turns`` and ``images`` by now."""
        key = (tenant, session)
        pictures = [part for part in parts if isinstance(part, Picture)]
        conversation = (
            _Conversation(pictures[0]) if turns == images == len(pictures) == 1 else self._conversations.get(key)
        )
        if conversation is None:
            return
        # A turn may be missing: the first one came without a picture.
        conversation.over = (
            conversation.over or images > 1 or len(conversation.questions) != turns - 1 or turns > MOST_QUESTIONS
        )
        if not conversation.over:
            conversation.questions.append(" ".join(part for part in parts if isinstance(part, str)))
            self._put(key, conversation)

    def pop(self, tenant: str, most: int) -> list[Sample]:
        """The samples of ``tenant``, latest first, which are kept no longer; 0 for ``most`` takes all.

        Raises:
            ServiceError: CALIBRATION_UNAVAILABLE where there are none.
        """
        keys = [
            key
            for key, conversation in reversed(self._conversations.items())
            if key[0] == tenant and conversation.questions
        ]
        if not keys:
            raise ServiceError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "CALIBRATION_UNAVAILABLE",
                "no conversation about a picture was held since the last search; send samples, or try again later"
                if self._most
                else "this server keeps nothing of conversations; send samples, or start it with --calibration-samples",
            )
        popped = [self._conversations.pop(key) for key in keys[: most or None]]
        return [Sample(conversation.picture, tuple(conversation.questions)) for conversation in popped]

    def _put(self, key: tuple[str, str], conversation: _Conversation) -> None:
        self._conversations[key] = conversation
        self._conversations.move_to_end(key)
        while len(self._conversations) > self._most or self._bytes() > self._most_bytes:
            self._conversations.popitem(last=False)

    def _bytes(self) -> int:
        return sum(conversation.picture.pixels.nbytes for conversation in self._conversations.values())
