"""Generating an answer: the one loop that turns logits into tokens, and tokens into text.

:func:`decode` is the loop without a model. It yields a :class:`Forward` for each step, and its driver runs the step and
sets the token. An engine runs the steps of many requests in one batch; :func:`generate` runs those of one sequence.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import Enum, auto

from vflowopt.runtime.chat import ChatFormat
from vflowopt.runtime.detokenize import TextStream
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import Tier
from vflowopt.runtime.sampling import Sampler, SamplingOptions
from vflowopt.runtime.sequence import Item, Sequence


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = auto()
    """The model ended it."""
    STOP_STRING = auto()
    """A stop string was generated."""
    LENGTH = auto()
    """It reached the limit of tokens."""


@dataclass(eq=False)
class Forward:
    """A sequence to be run to the end of its log, and the token that comes next.

    Attributes:
        sequence: what to run.
        sampler: draws the next token; None: no token is wanted.
        token: the next token, once the sequence has run.
        num_run: tokens that the model has run for it so far.
        begun: ``time.perf_counter()`` at the beginning of the first step that ran it.
        restored_from: where the cache of the sequence was restored from before it ran; None: it was not.
    """

    sequence: Sequence
    sampler: Sampler | None = None
    token: int = -1
    num_run: int = 0
    begun: float | None = None
    restored_from: Tier | None = None


@dataclass(frozen=True, eq=False)
class Generated:
    """An answer.

    Attributes:
        text: the whole text.
        tokens: the tokens of the answer in the sequence's log.
        num_generated: tokens that were drawn, including one that ended the answer.
        finish_reason: why it ended.
        prefill: the step that ran the prompt and drew the first token.
        first_token: ``time.perf_counter()`` when the first token was known.
    """

    text: str
    tokens: tuple[int, ...]
    num_generated: int
    finish_reason: FinishReason
    prefill: Forward
    first_token: float


def decode(
    sequence: Sequence,
    chat: ChatFormat,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    stop: abc.Sequence[str] = (),
    emit: Callable[[str], None] = lambda delta: None,
) -> Generator[Forward, None, Generated]:
    """Generate an answer that continues the log of ``sequence``. The driver of this generator runs its steps.

    The tokens of the answer are appended to the log. The one that ends it is not: the next turn closes the answer.

    Args:
        sequence: what to answer; some of it is not cached yet.
        chat: knows the tokens that end an answer, and turns tokens into text.
        sampler: draws the tokens.
        max_new_tokens: the most tokens of the answer, at least 1.
        min_new_tokens: the fewest tokens before the model may end the answer.
        stop: strings that end the answer; none of them is part of it.
        emit: receives the text in pieces, each as soon as no later token can change it.

    Yields:
        Steps to be run. The driver sets the token of each before it asks for the next one.

    Returns:
        The answer.
    """
    text = TextStream(chat, stop)
    begin, generated, first_token = len(sequence.log), 0, 0.0
    prefill = forward = Forward(sequence, sampler)
    while True:
        sampler.banned = chat.stop_ids if generated < min_new_tokens else ()
        yield forward
        token = forward.token
        generated += 1
        if generated == 1:
            first_token = time.perf_counter()  # the token is known, so the prefill has ended on any device
        if token in chat.stop_ids:
            reason = FinishReason.STOP
            break
        sequence.log.append(token)
        if delta := text.push(token):
            emit(delta)
        if text.stopped or generated == max_new_tokens:
            reason = FinishReason.LENGTH
            break
        forward = Forward(sequence, sampler)
    if delta := text.finish():
        emit(delta)
    if text.stopped:  # the text that was held back may contain a stop string
        reason = FinishReason.STOP_STRING
        sequence.truncate(begin + text.tokens_shown)  # the log holds no token that was not shown
    tokens = tuple(item for item in sequence.log[begin:] if isinstance(item, int))
    return Generated(text.text, tokens, generated, reason, prefill, first_token)


def generate(
    runtime: Runtime,
    sequence: Sequence,
    items: abc.Sequence[Item],
    *,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    sampling: SamplingOptions | None = None,
    stop: abc.Sequence[str] = (),
) -> Generator[str, None, Generated]:
    """Append ``items`` to a sequence and generate the answer, piece by piece.

    If the generator is closed before its end, or raises, the sequence is as it was before.

    Args:
        runtime: runs the model.
        sequence: the conversation so far, begun by :meth:`Runtime.start`.
        items: the next turn, written by :meth:`ChatFormat.turn`.
        max_new_tokens: the most tokens of the answer, at least 1.
        min_new_tokens: the fewest tokens before the model may end the answer.
        sampling: how tokens are drawn; None: always the most likely one.
        stop: strings that end the answer; none of them is part of it.

    Yields:
        Pieces of text, never empty.

    Returns:
        The answer as a whole: the value of ``yield from``, or of the generator's ``StopIteration``.

    Raises:
        PoolExhausted: too few KV pages are free.
        ValueError: there is nothing to run.
    """
    before = sequence.checkpoint()
    sequence.log.extend(items)
    pieces: list[str] = []
    steps = decode(
        sequence,
        runtime.chat,
        Sampler(sampling),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop=stop,
        emit=pieces.append,
    )
    try:
        while True:
            try:
                forward = next(steps)
            except StopIteration as end:
                yield from pieces
                generated: Generated = end.value
                return generated
            yield from pieces
            pieces.clear()
            (token,) = runtime.step([sequence], [None], [forward.sampler])
            assert token is not None  # a sampler was given, and no limit
            forward.token = token
    except BaseException:
        sequence.rollback(before)
        raise
