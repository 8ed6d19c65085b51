"""A turn that was answered, read again by the unpruned model and once more pruned: how far apart the two are."""

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
"""Shortages of pages after which it is given up."""


@dataclass(frozen=True)
class Fidelity:
    """Of one turn.

    Attributes:
        cosine: of the last hidden state at the end of the prompt with the unpruned model's.
        tokens: of the answer that were looked at; none of an answer that was sampled.
        tokens_agreed: those that the unpruned model, given all that came before them, would have chosen.
    """

    cosine: float
    tokens: int
    tokens_agreed: int


@dataclass(frozen=True, eq=False)
class AnsweredTurn:
    """A turn as it was when it ended.

    Attributes:
        tenant: whose it was.
        strategy_name: resource name of the strategy that its pictures were compressed by.
        strategy: that strategy.
        log: all that was said up to the end of the answer.
        prompt: how many items of it the answer was given to.
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
        """What the pictures in it are called in caches."""
        return frozenset(item.identity for item in self.log if isinstance(item, CompressedImage))


class Replay:
    """One turn read again.

    Args:
        runtime: the model.
        turn: what to read.
        pictures: its pictures by what they are called in caches, to be compressed again, without loss.

    Attributes:
        sequences: what may hold KV pages between two pieces; others may release them.
    """

    def __init__(self, runtime: Runtime, turn: AnsweredTurn, pictures: Mapping[Identity, Picture]) -> None:
        self.sequences: list[Sequence] = []
        self._runtime = runtime
        self._turn = turn
        self._pictures = pictures

    def pieces(self) -> Generator[Pause | Fidelity, None, None]:
        """Read in pieces of bounded size. The last value is the :class:`Fidelity`, those before it are pauses.

        Raises:
            PoolExhausted: there was no room, however often it was tried.
            ValueError: unpruned, the sequence is longer than the model's context.
        """
        turn, full = self._turn, Strategy.full()
        unpruned: dict[Identity, CompressedImage] = {}
        for identity in sorted(turn.pictures):
            encoding = Aside("encode", partial(self._runtime.compress, [self._pictures[identity]], full))
            yield encoding
            (unpruned[identity],) = encoding.run()
        last = turn.prompt - 1
        # The token of the answer at place n is chosen by the state at n - 1.
        answer = [item for item in turn.log[turn.prompt :] if isinstance(item, int)] if turn.greedy else []
        whole = [unpruned[item.identity] if isinstance(item, CompressedImage) else item for item in turn.log]
        states = yield from self._states(full, whole[: last + max(len(answer), 1)], last)
        pruned = yield from self._states(turn.strategy, turn.log[: turn.prompt], last)
        chosen = self._most_likely(states)[: len(answer)]
        yield Fidelity(
            cosine=float(torch.cosine_similarity(states[0], pruned[0], dim=0)),
            tokens=len(answer),
            tokens_agreed=sum(one == other for one, other in zip(answer, chosen, strict=True)),
        )

    def _states(self, strategy: Strategy, log: abc.Sequence[Item], first: int) -> Generator[Pause, None, Tensor]:
        """Read ``log`` under ``strategy``; the last hidden states [places, hidden] from place ``first`` on."""
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
                    if sequence.pending_tokens:  # others may have released what was read before
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

    @torch.inference_mode()
    def _most_likely(self, states: Tensor) -> list[int]:
        model = self._runtime.model
        logits: Tensor = model.head(states.to(model.device, model.dtype))
        tokens: list[int] = logits.float().argmax(-1).tolist()
        return tokens
