"""What work asks of the model: a picture encoded, or a conversation run. The scheduler answers, many at a time."""

from __future__ import annotations

from dataclasses import dataclass

from vflowopt.conversation import Conversation
from vflowopt.picture import Picture
from vflowopt.strategy import Strategy


@dataclass(frozen=True, eq=False)
class Encode:
    """A picture to be encoded and compressed. The answer: the ``CompressedImage``, and whether it was at hand.

    Attributes:
        picture: the picture.
        strategy: by which to compress it.
        tenant: for whom; what was compressed for others is not at hand.
    """

    picture: Picture
    strategy: Strategy
    tenant: str


@dataclass(eq=False)
class Run:
    """A conversation whose log shall be cached to its end.

    The answer is the logits [vocabulary] after the last item, or None where they are not wanted.

    Attributes:
        ran: tokens that the model ran for it, so far.
    """

    conversation: Conversation
    want_logits: bool = True
    ran: int = 0
