"""Prefill: run what a conversation's cache does not cover of its log yet, a bounded piece a step."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

from torch import Tensor

from vflow_server.workbench import Workbench
from vflowopt.conversation import Conversation

PIECE = 512
"""Tokens of a step at most, so that a long prompt holds up nobody's answer and can be cancelled on the way."""


def prefill(
    bench: Workbench, conversation: Conversation, *, want_logits: bool = True
) -> Generator[None, None, Tensor | None]:
    """Run the rest of the log; the result is the logits [vocabulary] after its last item, if they are wanted.

    Whoever closes the generator, or gets an exception from it, must roll the conversation back.

    Raises:
        CapacityExhausted: pages are short though every idle dialogue was released.
    """
    piece = partial(bench.runtime.advance, [conversation], [PIECE], want_logits=want_logits)
    while True:
        (logits,) = bench.residency.with_room(piece)
        if conversation.cached_items == len(conversation.log):
            return logits
        yield
