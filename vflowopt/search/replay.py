"""Replaying an answered turn, unpruned and pruned, to measure how close the pruned model stays to the unpruned one."""

from __future__ import annotations

from collections import abc
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Identity, Picture
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Item, Sequence
from vflowopt.search.pause import Aside, Pause, Shortage

PIECE = 256
"""Tokens that one piece runs."""

PATIENCE = 16
"""Shortages of pages after which a replay is given up."""


@dataclass(frozen=True)
class Fidelity:
    """How close the pruned model is to the unpruned one in one turn.

    Attributes:
        cosine: cosine similarity of the two models' last hidden states at the end of the prompt.
        tokens: tokens of the answer that were compared; 0 for an answer that was sampled.
        tokens_agreed: how many of these the unpruned model would have chosen, given everything before them.
    """

    cosine: float
    tokens: int
    tokens_agreed: int


@dataclass(frozen=True, eq=False)
class AnsweredTurn:
    """A turn as it was when it ended.

    Attributes:
        tenant: the tenant of its session.
        strategy_name: resource name of the strategy that its pictures were compressed by.
        strategy: that strategy.
        log: the sequence's log up to the end of the answer.
        prompt: how many items of the log precede the answer.
        greedy: whether each token of the answer was the most likely one.
    """

    tenant: str
    strategy_name: str
    strategy: Strategy
    log: tuple[Item, ...]
    prompt: int
    greedy: bool

    @property
    def pictures(self) -> frozenset[Identity]:
        """The identities of its pictures."""
        return frozenset(item.identity for item in self.log if isinstance(item, CompressedImage))


class Replay:
    """One turn, prefilled again unpruned and pruned.

    Args:
        runtime: runs the model.
        turn: the turn.
        pictures: its pictures, by identity; they are compressed again with every token kept.

    Attributes:
        sequences: the sequences that may hold KV pages between two pieces. Other work may release them there.
    """

    def __init__(self, runtime: Runtime, turn: AnsweredTurn, pictures: Mapping[Identity, Picture]) -> None:
        self.sequences: list[Sequence] = []
        self._runtime = runtime
        self._turn = turn
        self._pictures = pictures

    def pieces(self) -> Generator[Pause | Fidelity, None, None]:
        """Replay in pieces of bounded size.

        Yields:
            Pauses; the last value is the :class:`Fidelity`.

        Raises:
            PoolExhausted: a sequence did not fit into the KV pool after all retries.
            ValueError: unpruned, the sequence is longer than the model's context.
        """
        turn, full = self._turn, Strategy.full()
        unpruned: dict[Identity, CompressedImage] = {}
        for identity in sorted(turn.pictures):
            encoding = Aside("encode", partial(self._runtime.compress, [self._pictures[identity]], full))
            yield encoding
            (unpruned[identity],) = encoding.run()
        last = turn.prompt - 1
        # The state at place n - 1 chooses the token at place n.
        answer = [item for item in turn.log[turn.prompt :] if isinstance(item, int)] if turn.greedy else []
        whole = [unpruned[item.identity] if isinstance(item, CompressedImage) else item for item in turn.log]
        states = yield from self._states(full, whole[: last + max(len(answer), 1)], last)
        pruned = yield from self._states(turn.strategy, turn.log[: turn.prompt], last)
        chosen = self._runtime.most_likely(states)[: len(answer)]
        yield Fidelity(
            cosine=float(torch.cosine_similarity(states[0], pruned[0], dim=0)),
            tokens=len(answer),
            tokens_agreed=sum(one == other for one, other in zip(answer, chosen, strict=True)),
        )

    def _states(self, strategy: Strategy, log: abc.Sequence[Item], first: int) -> Generator[Pause, None, Tensor]:
        """Prefill ``log`` under ``strategy``; the last hidden states [places, hidden] from place ``first`` on."""
        sequence = self._runtime.start(strategy)
        sequence.log = list(log)
        if sequence.position > self._runtime.context:
            raise ValueError(
                f"unpruned, the conversation takes {sequence.position} positions, more than the model's "
                f"{self._runtime.context}"
            )
        self.sequences.append(sequence)
        states: list[Tensor] = []
        shortages = 0
        try:
            while (begin := first + sum(map(len, states))) < len(log):
                try:
                    sequence.log = list(log[:begin])
                    if sequence.pending_tokens:  # other work may have released what was cached before
                        self._runtime.advance([sequence], [PIECE], want_logits=False)
                    else:
                        sequence.log = list(log[: begin + PIECE])
                        states += self._runtime.states([sequence], [range(begin, len(sequence.log))])
                except PoolExhausted:
                    shortages += 1
                    sequence.release()
                    if shortages == PATIENCE or sequence.pages_wanted > self._runtime.pool.pages:
                        raise
                    yield Shortage(sequence.pages_wanted)
                else:
                    yield None
        finally:
            self.sequences.remove(sequence)
            sequence.release()
        return torch.cat(states).cpu()
