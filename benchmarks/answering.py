"""Greedy answers of many conversations at once, with the logits and the hidden state at the end of each prompt."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vflowopt.runtime.generate import decode
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import Sampler, sample
from vflowopt.runtime.sequence import Item, Sequence


@dataclass(frozen=True, eq=False)
class Reply:
    """An answer, and the logits and hidden state before its first token.

    Attributes:
        answer: the text.
        logits: float32 [vocabulary], of the answer's first token.
        state: float32 [hidden], of the prompt's last token after the last layer and its norm.
    """

    answer: str
    logits: Tensor
    state: Tensor


def reply(
    runtime: Runtime, conversations: abc.Sequence[Sequence], prompts: abc.Sequence[abc.Sequence[Item]], longest: int
) -> list[Reply]:
    """Answer one prompt in each conversation, all in one batch; each log then holds the prompt and the answer.

    Args:
        runtime: the model.
        conversations: all different.
        prompts: the items that are appended to each log, up to the prompt for an answer.
        longest: the most tokens of an answer.
    """
    for conversation, prompt in zip(conversations, prompts, strict=True):
        conversation.log.extend(prompt)
    with _states_before_the_head(runtime) as states:
        logits = [row for row in runtime.advance(conversations) if row is not None]
    answers = _generate(runtime, conversations, logits, longest)
    return [Reply(answer, row, state) for answer, row, state in zip(answers, logits, torch.cat(states), strict=True)]


def _generate(
    runtime: Runtime, conversations: abc.Sequence[Sequence], logits: abc.Sequence[Tensor], longest: int
) -> list[str]:
    """Answer conversations whose prompts have run and given ``logits``; each step runs all that are not done."""
    answers = ["" for _ in conversations]
    running = {
        place: decode(conversation, runtime.chat, Sampler(), max_new_tokens=longest)
        for place, conversation in enumerate(conversations)
    }
    forwards = [next(steps) for steps in running.values()]
    tokens: abc.Sequence[int | None] = sample(torch.stack(list(logits)), [Sampler() for _ in conversations])
    while running:
        going = []
        for (place, steps), forward, token in zip(list(running.items()), forwards, tokens, strict=True):
            assert token is not None  # a sampler was given, and no limit
            forward.token = token
            try:
                going.append(next(steps))
            except StopIteration as end:
                answers[place] = end.value.text
                del running[place]
        forwards = going
        if forwards:
            tokens = runtime.step(
                [each.sequence for each in forwards], [None] * len(forwards), [each.sampler for each in forwards]
            )
    return answers


@contextmanager
def _states_before_the_head(runtime: Runtime) -> Iterator[list[Tensor]]:
    """Collect the inputs of the output head, [rows, hidden] of each run."""
    states: list[Tensor] = []

    def collect(_: Any, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0].float().cpu())

    hook = runtime.model.head.register_forward_pre_hook(collect)
    try:
        yield states
    finally:
        hook.remove()
