"""Part: conversations a second in a closed loop, each about a picture of its own, without server and network.

The loop stands in for the service's scheduler and has its bounds: in every step a token of every answer, and as many
tokens of prompts as it allows; pictures are encoded by the service's own encoder, beside the steps.
"""

from __future__ import annotations

import statistics
import time
from collections import abc
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from benchmarks.device_check.part import Setting, last_line
from benchmarks.device_check.shapes import ONEVISION, runtime_for
from benchmarks.geometry import QUESTION_TOKENS
from benchmarks.table import Row
from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.ops import Encode, Forward
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.generate import decode
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import Sampler
from vflowopt.runtime.sequence import Sequence

_TURNS, _NEW_TOKENS = 3, 24
_PROMPT_TOKENS = 512
"""As the service's scheduler has it."""
_PICTURES = 4
"""Pictures that are encoded in one batch at most, as the service's encoding queue has it."""


def rows(setting: Setting) -> Iterator[Row]:
    """A row for each number of conversations and each budget."""
    model = ONEVISION.model(setting)
    runtime = runtime_for(model, (8 << 20) if setting.rehearse else 1 << 40)
    at_once = (1, 3) if setting.rehearse else (16, 64, 1)
    budgets = (0.1, 1.0)
    pictures = [ONEVISION.shown(setting, seed) for seed in range(4 if setting.rehearse else 32)]
    runs = [(conversations, budget) for conversations in at_once for budget in budgets]
    for place, (conversations, budget) in enumerate(runs):
        strategy = Strategy.full() if budget == 1 else Strategy.preset(budget, runtime.layers)
        loop = ClosedLoop(runtime, strategy, pictures)
        seconds = 1.0 if setting.rehearse else max(setting.left, 0) / (len(runs) - place)
        figures: dict[str, object] = dict.fromkeys(
            ("conversations_per_s", "turns_per_s", "tokens_per_s", "first_token_p50_ms", "error")
        )
        try:
            figures |= loop.run(conversations, seconds)
        except Exception as failure:  # such as too few pages: the others are still measured
            figures["error"] = last_line(failure)
        finally:
            loop.close()
        yield {"conversations": conversations, "retention": f"{budget:.0%}", **figures}


@dataclass(eq=False)
class _Talk:
    """A conversation under way.

    Attributes:
        steps: yields what it waits for.
        sequence: its tokens.
        op: what it waits for.
    """

    steps: Generator[Encode | Forward]
    sequence: Sequence
    op: Encode | Forward = field(init=False)


class ClosedLoop:
    """Conversations that begin anew as soon as they end.

    Args:
        runtime: the model.
        strategy: compresses the pictures.
        pictures: are shown in turn.
    """

    def __init__(self, runtime: Runtime, strategy: Strategy, pictures: abc.Sequence[Picture]) -> None:
        self._runtime, self._strategy, self._pictures = runtime, strategy, pictures
        self._encoder = EncoderThread(runtime)
        self._talks: list[_Talk] = []
        self._encoding: tuple[list[_Talk], Pieces[list[CompressedImage]]] | None = None
        self._piece: Future[list[CompressedImage] | None] | None = None
        self._begun = 0
        self._ended = 0
        self._first_token_s: list[float] = []

    def run(self, at_once: int, seconds: float) -> Row:
        """Hold ``at_once`` conversations for some seconds, and one at least to its end; the row's figures."""
        begun = time.perf_counter()
        while (taken := time.perf_counter() - begun) < seconds or not self._ended:
            while len(self._talks) < at_once:
                self._open()
            self._encode()
            self._step()
        return {
            "conversations_per_s": self._ended / taken,
            "turns_per_s": len(self._first_token_s) / taken,
            "tokens_per_s": len(self._first_token_s) * _NEW_TOKENS / taken,
            "first_token_p50_ms": 1e3 * statistics.median(self._first_token_s),
        }

    def close(self) -> None:
        """Give back everything that the conversations hold."""
        if self._piece is not None:
            self._piece.exception()
        self._encoder.close()
        for talk in self._talks:
            talk.steps.close()
            talk.sequence.release()

    def _open(self) -> None:
        sequence = self._runtime.start(self._strategy)
        talk = _Talk(self._converse(sequence, self._pictures[self._begun % len(self._pictures)]), sequence)
        self._begun += 1
        talk.op = next(talk.steps)
        self._talks.append(talk)

    def _converse(self, sequence: Sequence, picture: Picture) -> Generator[Encode | Forward]:
        for turn in range(_TURNS):
            asked = time.perf_counter()
            if not turn:
                showing = Encode(picture, self._strategy, "")
                yield showing
                sequence.log.append(showing.image)
            sequence.log.extend([0] * QUESTION_TOKENS)
            answer = yield from decode(
                sequence, self._runtime.chat, Sampler(), max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS
            )
            self._first_token_s.append(answer.first_token - asked)

    def _go_on(self, talk: _Talk) -> None:
        try:
            talk.op = next(talk.steps)
        except StopIteration:
            self._ended += 1
            talk.sequence.release()
            self._talks.remove(talk)

    def _encode(self) -> None:
        """Take the piece that is done, and begin the next one."""
        answering = any(isinstance(talk.op, Forward) for talk in self._talks)
        if self._piece is not None:
            if answering and not self._piece.done():
                return
            images, self._piece = self._piece.result(), None
            if images is not None:
                assert self._encoding is not None
                (talks, _), self._encoding = self._encoding, None
                for talk, image in zip(talks, images, strict=True):
                    assert isinstance(talk.op, Encode)
                    talk.op.put(image, cache_hit=False)
                    self._go_on(talk)
        if self._encoding is None:
            waiting = [talk for talk in self._talks if isinstance(talk.op, Encode)][:_PICTURES]
            if not waiting:
                return
            ops = [talk.op for talk in waiting if isinstance(talk.op, Encode)]
            self._encoding = waiting, self._encoder.begin(ops)
        self._piece = self._encoder.advance(self._encoding[1], threads=1)

    def _step(self) -> None:
        """A token of every answer, and prompts up to their bound."""
        running = [(talk, talk.op) for talk in self._talks if isinstance(talk.op, Forward)]
        left, batch = _PROMPT_TOKENS, []
        for talk, op in running:
            pending = talk.sequence.pending_tokens
            count = 1 if pending == 1 else min(pending, left)
            if count:
                left -= count if pending > 1 else 0
                batch.append((talk, op, count, pending))
        if not batch:
            return
        tokens = self._runtime.step(
            [talk.sequence for talk, _, _, _ in batch],
            [count for _, _, count, _ in batch],
            [op.sampler for _, op, _, _ in batch],
        )
        for (talk, op, count, pending), token in zip(batch, tokens, strict=True):
            if count == pending:
                assert token is not None
                op.token = token
                self._go_on(talk)
