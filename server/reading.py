"""Reading: have a dialogue say more and cache it, from a shared prefix where one is held."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from torch import Tensor

from vflow_server.dialogue import Dialogue
from vflow_server.needs import Run
from vflow_server.workbench import Workbench
from vflowopt.compression import CompressedImage
from vflowopt.conversation import Item


def read(
    bench: Workbench,
    dialogue: Dialogue,
    items: Sequence[Item],
    *,
    want_logits: bool = True,
) -> Generator[Run, Tensor | None, tuple[Tensor | None, int]]:
    """Append ``items`` to the log and run all that is not cached.

    Whoever closes the generator, or gets an exception from it, must roll the conversation back.

    Args:
        bench: the model, and what it has at hand.
        dialogue: whose conversation's log grows.
        items: what is said. While no turn is finished the tenant's other dialogues may begin the same way: then
            pictures make prefixes to share.
        want_logits: False where nobody will read them.

    Returns:
        Logits [vocabulary] after the last item, if they are wanted; and how many tokens the model had to run.

    Raises:
        CapacityExhausted: pages are short though everything was released that can be.
    """
    conversation, tenant = dialogue.conversation(bench.runtime), dialogue.tenant
    said = [*conversation.log, *items]
    bare = not conversation.resident and not bench.residency.parked(conversation)
    if bare and (prefix := bench.prefixes.find(tenant, conversation.strategy, said)) is not None:
        conversation.log.extend(said[len(conversation.log) : len(prefix.log)])
        conversation.share(prefix)
    rest = said[len(conversation.log) :]
    ran = 0
    pictures = [place for place, item in enumerate(rest) if isinstance(item, CompressedImage)]
    if not dialogue.turns and pictures:
        # Stop behind the last picture, for others who begin with it and ask something else.
        conversation.log.extend(rest[: pictures[-1] + 1])
        beginning = Run(conversation, want_logits=False)
        yield beginning
        ran = beginning.ran
        bench.prefixes.keep(tenant, conversation)
        rest = rest[pictures[-1] + 1 :]
    conversation.log.extend(rest)
    if conversation.cached_items == len(conversation.log) and not want_logits:
        return None, ran
    whole = Run(conversation, want_logits)
    logits = yield whole
    return logits, ran + whole.ran
