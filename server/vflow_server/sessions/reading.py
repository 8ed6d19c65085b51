"""Reading: have a dialogue say more and cache it, from a shared prefix where one is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Await, Run
from vflow_server.engine.workbench import Workbench
from vflow_server.kv.offload import Tier
from vflow_server.kv.session_log import Dialogue
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.sequence import Conversation, Item


@dataclass(frozen=True)
class Reading:
    """What became of it.

    Attributes:
        logits: [vocabulary] after the last item; None if they are not wanted.
        ran: tokens that the model had to run.
        begun: ``time.perf_counter()`` when the model first ran any of it; None if nothing had to run.
        restored: from where a parked cache was brought back for it, if one was.
    """

    logits: Tensor | None
    ran: int
    begun: float | None
    restored: Tier | None


def read(
    bench: Workbench,
    dialogue: Dialogue,
    items: Sequence[Item],
    *,
    want_logits: bool = True,
) -> Steps[Reading]:
    """Append ``items`` to the log and run all that is not cached.

    Whoever closes the generator, or gets an exception from it, must roll the conversation back.

    Args:
        bench: the model, and what it has at hand.
        dialogue: whose conversation's log grows.
        items: what is said. While no turn is finished the tenant's other dialogues may begin the same way: then
            pictures make prefixes to share.
        want_logits: False where nobody will read them.

    Raises:
        CapacityExhausted: pages are short though everything was released that can be.
    """
    conversation, tenant = dialogue.conversation(bench.runtime), dialogue.tenant
    said = [*conversation.log, *items]
    yield from read_parked(bench, conversation)
    bare = not conversation.resident and not bench.parked.holds(conversation)
    if bare and any(isinstance(item, CompressedImage) for item in said):
        prefix = bench.prefixes.find(tenant, conversation.strategy, said)
        bench.metrics.prefix(hit=prefix is not None)
        if prefix is not None:
            conversation.log.extend(said[len(conversation.log) : len(prefix.log)])
            conversation.share(prefix)
    rest = said[len(conversation.log) :]
    runs = []
    pictures = [place for place, item in enumerate(rest) if isinstance(item, CompressedImage)]
    if not dialogue.turns and pictures:
        # Stop behind the last picture, for others who begin with it and ask something else.
        conversation.log.extend(rest[: pictures[-1] + 1])
        runs.append(Run(conversation, want_logits=False))
        yield runs[-1]
        bench.prefixes.keep(tenant, conversation)
        rest = rest[pictures[-1] + 1 :]
    conversation.log.extend(rest)
    logits = None
    if conversation.cached_items < len(conversation.log) or want_logits:
        runs.append(Run(conversation, want_logits))
        logits = yield runs[-1]
    return Reading(
        logits,
        ran=sum(run.ran for run in runs),
        begun=runs[0].begun if runs else None,
        restored=next((run.restored for run in runs if run.restored), None),
    )


def read_parked(bench: Workbench, conversation: Conversation) -> Steps[None]:
    """Have a parked cache of ``conversation`` at hand, where one is held in a file."""
    if not conversation.resident and (reading := bench.parked.read_ahead(conversation)) is not None:
        yield Await(reading)
        bench.parked.has_been_read(conversation, reading)
