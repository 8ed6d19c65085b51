"""Greedy answers of many conversations at once, with what the model thought at the end of each prompt."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Item, Sequence


@dataclass(frozen=True, eq=False)
class Reply:
    """An answer, and the state of the model before its first token.

    Attributes:
        answer: the text.
        logits: float32 [vocabulary], of the answer's first token.
        state: float32 [hidden], of the prompt's last token behind the last layer and its norm.
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
        prompts: what each log grows by, up to the prompt for an answer.
        longest: tokens of an answer at most.
    """
    for conversation, prompt in zip(conversations, prompts, strict=True):
        conversation.log.extend(prompt)
    with _states_before_the_head(runtime) as states:
        logits = [row for row in runtime.advance(conversations) if row is not None]
    answers: list[list[int]] = [[] for _ in conversations]
    running = {place: int(row.argmax()) for place, row in enumerate(logits)}
    while running := {
        place: token
        for place, token in running.items()
        if token not in runtime.chat.stop_ids and len(answers[place]) < longest
    }:
        for place, token in running.items():
            answers[place].append(token)
        step = runtime.decode([conversations[place] for place in running], list(running.values()))
        running = {place: int(row.argmax()) for place, row in zip(running, step, strict=True)}
    return [
        Reply(runtime.chat.decode(answer), row, state)
        for answer, row, state in zip(answers, logits, torch.cat(states), strict=True)
    ]


@contextmanager
def _states_before_the_head(runtime: Runtime) -> Iterator[list[Tensor]]:
    """Collects what the output head is given, [rows, hidden] each time."""
    states: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0].float().cpu())

    hook = runtime.model.head.register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        hook.remove()
