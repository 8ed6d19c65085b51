"""Reading: have a dialogue say more and cache it, from a shared prefix where one is held."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from torch import Tensor

from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Forward, Wait
from vflow_server.engine.workbench import Workbench
from vflow_server.kv.session_state import SessionState
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.offload import Tier
from vflowopt.runtime.sequence import Item, Sequence


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
    state: SessionState,
    items: abc.Sequence[Item],
    *,
    want_logits: bool = True,
) -> Steps[Reading]:
    """Append ``items`` to the log and run all that is not cached.

    Whoever closes the generator, or gets an exception from it, must roll the conversation back.

    Args:
        bench: the model, and what it has at hand.
        state: whose conversation's log grows.
        items: what is said. While no turn is finished the tenant's other dialogues may begin the same way: then
            pictures make prefixes to share.
        want_logits: False where nobody will read them.

    Raises:
        CapacityExhausted: pages are short though everything was released that can be.
    """
    sequence, tenant = state.sequence(bench.runtime), state.tenant
    said = [*sequence.log, *items]
    yield from read_parked(bench, sequence)
    bare = not sequence.resident and not bench.offloaded.holds(sequence)
    if bare and any(isinstance(item, CompressedImage) for item in said):
        prefix = bench.prefixes.find(tenant, sequence.strategy, said)
        bench.metrics.prefix(hit=prefix is not None)
        if prefix is not None:
            sequence.log.extend(said[len(sequence.log) : len(prefix.log)])
            sequence.share(prefix)
    rest = said[len(sequence.log) :]
    runs = []
    pictures = [place for place, item in enumerate(rest) if isinstance(item, CompressedImage)]
    if not state.turns and pictures:
        # Stop behind the last picture, for others who begin with it and ask something else.
        sequence.log.extend(rest[: pictures[-1] + 1])
        runs.append(Forward(sequence, want_logits=False))
        yield runs[-1]
        bench.prefixes.keep(tenant, sequence)
        rest = rest[pictures[-1] + 1 :]
    sequence.log.extend(rest)
    logits = None
    if sequence.num_cached_items < len(sequence.log) or want_logits:
        runs.append(Forward(sequence, want_logits))
        logits = yield runs[-1]
    return Reading(
        logits,
        ran=sum(run.ran for run in runs),
        begun=runs[0].begun if runs else None,
        restored=next((run.restored for run in runs if run.restored), None),
    )


def read_parked(bench: Workbench, sequence: Sequence) -> Steps[None]:
    """Have a parked cache of ``sequence`` at hand, where one is held in a file."""
    if not sequence.resident and (reading := bench.offloaded.read_ahead(sequence)) is not None:
        yield Wait(reading)
        bench.offloaded.has_been_read(sequence, reading)
