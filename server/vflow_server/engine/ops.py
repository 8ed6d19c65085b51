"""What work asks for: a picture or a video encoded, a sequence run, another thread, spare time.

The scheduler answers.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from vflowopt.compression.strategy import Strategy
from vflowopt.media.video import Visual
from vflowopt.runtime.offload import Tier
from vflowopt.runtime.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Encode:
    """A picture or a video to be encoded and compressed.

    The answer: the ``CompressedImage``, and whether it was at hand.

    Attributes:
        visual: the picture or video.
        strategy: by which to compress it.
        tenant: for whom; what was compressed for others is not at hand.
    """

    visual: Visual
    strategy: Strategy
    tenant: str


@dataclass(eq=False)
class Forward:
    """A sequence whose log shall be cached to its end.

    The answer is the logits [vocabulary] after the last item, or None where they are not wanted.

    Attributes:
        ran: tokens that the model ran for it, so far.
        begun: ``time.perf_counter()`` at the beginning of the first step that it took part in.
        restored: from where a parked cache of the sequence was brought back for it, if one was.
    """

    sequence: Sequence
    want_logits: bool = True
    ran: int = 0
    begun: float | None = None
    restored: Tier | None = None


@dataclass(frozen=True, eq=False)
class Wait:
    """What another thread does, such as reading a file. The answer, None, comes when ``future`` is done."""

    future: Future[Any]


@dataclass(frozen=True, eq=False)
class Idle:
    """Time that nobody else needs, for one bounded piece of work. The answer is None."""
