"""Pictures and questions of recent conversations, held in memory to calibrate strategies on.

Nothing is held unless the operator opted in, and videos never are. Belongs to the event loop's thread.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from vflow_server.rpc.errors import ServiceError
from vflowopt.media.picture import Picture
from vflowopt.media.video import Visual
from vflowopt.search.calibration import Sample

MOST_QUESTIONS = 8
"""Questions of a conversation that are held."""


@dataclass
class _Conversation:
    """A conversation about one picture: the questions of its turns, from the first one on.

    Attributes:
        picture: the picture.
        questions: the texts of the turns.
        over: whether further turns no longer count.
    """

    picture: Picture
    questions: list[str] = field(default_factory=list)
    over: bool = False


class LiveSamples:
    """The latest conversations about one picture each, by tenant. A conversation counts until another picture is added.

    Args:
        most: conversations to hold; 0 holds none. The tenant that has the most of them loses its oldest first.
        most_bytes: bytes of their decoded pictures to hold.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        # By tenant and session, in the order of their last turns.
        self._conversations: OrderedDict[tuple[str, str], _Conversation] = OrderedDict()

    def __len__(self) -> int:
        """Number of conversations that are held, of all tenants."""
        return len(self._conversations)

    def note_image(self, tenant: str, session: str, visual: Visual, *, images: int) -> None:
        """Note that ``visual`` was added to ``session`` before a turn; ``images`` counts it and those before."""
        if images == 1 and isinstance(visual, Picture):
            self._put((tenant, session), _Conversation(visual))
        elif (conversation := self._conversations.get((tenant, session))) is not None:
            conversation.over = True

    def note_turn(self, tenant: str, session: str, parts: Sequence[str | Visual], *, turns: int, images: int) -> None:
        """Note a finished turn of ``session``; ``turns`` and ``images`` count it and those before."""
        key = (tenant, session)
        pictures = [part for part in parts if isinstance(part, Picture)]
        conversation = (
            _Conversation(pictures[0]) if turns == images == len(pictures) == 1 else self._conversations.get(key)
        )
        if conversation is None:
            return
        # The conversation is also over if a turn is missing, because the first one had no picture.
        conversation.over = (
            conversation.over or images > 1 or len(conversation.questions) != turns - 1 or turns > MOST_QUESTIONS
        )
        if not conversation.over:
            conversation.questions.append(" ".join(part for part in parts if isinstance(part, str)))
            self._put(key, conversation)

    def pop(self, tenant: str, most: int) -> list[Sample]:
        """Remove and return the latest samples of ``tenant``, latest first.

        Args:
            tenant: the tenant.
            most: number of samples at most; 0: all.

        Raises:
            ServiceError: CALIBRATION_UNAVAILABLE if there are none.
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
            # The oldest of the tenant that has the most: one tenant's traffic does not displace that of others.
            (tenant, _), *_ = Counter(tenant for tenant, _ in self._conversations).most_common(1)
            del self._conversations[next(key for key in self._conversations if key[0] == tenant)]

    def _bytes(self) -> int:
        return sum(conversation.picture.pixels.nbytes for conversation in self._conversations.values())
