"""The scheduler: which needs of the running work are met in a step, and what gives way when KV pages run short.

Every step runs one batch of the model, one token of every answer that is under way and a bounded number of tokens of
prompts, and encodes a few pictures; first come, first served. So neither a long prompt nor a picture stalls the streams
of others for more than a step. Belongs to the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vflow_server.engine import Task
from vflow_server.needs import Encode, Run
from vflow_server.workbench import Workbench
from vflowopt.cache import PoolExhausted

PROMPT_TOKENS = 512
"""Tokens of prompts that a step runs at most, over all conversations."""

PICTURES = 4
"""Pictures that a step encodes at most; one only while answers are under way."""

Needing = Task[Any, Any]


class Scheduler:
    """Meets the needs of work.

    Args:
        bench: the model, and what it has at hand.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._residency = bench.residency

    def __call__(self, tasks: Sequence[Needing]) -> None:
        """One step: meet the needs of some of ``tasks``, which come in the order of their arrival."""
        running = [task for task in tasks if isinstance(task.need, Run)]
        answering = any(task.need.conversation.pending_tokens == 1 for task in running)
        self._run(running)
        encoding = [task for task in tasks if isinstance(task.need, Encode) and not self._at_hand(task)]
        self._encode([task for task in encoding if task.need.strategy == encoding[0].need.strategy], answering)

    def _at_hand(self, task: Needing) -> bool:
        """Answer with a picture that was compressed before, if there is one."""
        image = self._bench.held(task.need)
        if image is not None:
            task.answer((image, True))
        return image is not None

    def _encode(self, tasks: Sequence[Needing], answering: bool) -> None:
        """Encode the first few pictures in one batch; the same picture of a tenant is encoded once."""
        first = {(task.need.picture.digest, task.need.tenant): task for task in reversed(tasks)}
        batch = [task for task in tasks if task in first.values()][: 1 if answering else PICTURES]
        if not batch:
            return
        try:
            images = self._bench.compress([task.need for task in batch])
        except Exception as failure:
            if len(batch) > 1:  # whose picture it was shows when the first is encoded alone
                self._encode(batch[:1], answering)
            else:
                batch[0].fail(failure)
            return
        for task, image in zip(batch, images, strict=True):
            task.answer((image, False))

    def _run(self, tasks: Sequence[Needing]) -> None:
        """Run one batch.

        Where pages run short, what is idle gives way first, then the youngest in use, then all but the first of the
        batch; the first is refused only where it needs more than the whole pool.
        """
        while batch := self._batch(tasks):
            eldest = next(iter(batch))
            try:
                self._residency.restore(eldest.need.conversation)
                pending = [task.need.conversation.pending_tokens for task in batch]
                logits = self._bench.runtime.advance(
                    [task.need.conversation for task in batch],
                    list(batch.values()),
                    want_logits=any(task.need.want_logits for task in batch),
                )
            except PoolExhausted as shortage:
                if self._residency.release_idle() or self._residency.preempt(eldest.need.conversation):
                    continue
                if len(batch) > 1:
                    tasks = [eldest]
                    continue
                eldest.fail(self._residency.refusal(shortage))
                tasks = [task for task in tasks if task is not eldest]
            except Exception as failure:
                if len(batch) > 1:  # whose fault it was shows when each is run alone
                    for task in batch:
                        self._run([task])
                else:
                    eldest.fail(failure)
                return
            else:
                for task, before, row in zip(batch, pending, logits, strict=True):
                    conversation = task.need.conversation
                    task.need.ran += before - conversation.pending_tokens
                    if conversation.cached_items == len(conversation.log):
                        task.answer(row if task.need.want_logits else None)
                return

    def _batch(self, tasks: Sequence[Needing]) -> dict[Needing, int]:
        """Who runs in this step, and how many tokens of each.

        A prompt runs only when there is room for all of it beside the batch, unless it comes first: so two never keep
        taking each other's pages, and whoever came first always gets on.
        """
        batch: dict[Needing, int] = {}
        left = PROMPT_TOKENS
        answering = [task.need.conversation for task in tasks if task.need.conversation.pending_tokens == 1]
        promised = sum(conversation.pages_wanted for conversation in answering)
        for task in tasks:
            conversation = task.need.conversation
            if conversation.pending_tokens == 1:
                batch[task] = 1
                continue
            if batch:
                if not left or not self._make_room(promised + conversation.pages_wanted):
                    continue
                self._residency.restore(conversation)
            promised += conversation.pages_wanted
            batch[task] = min(conversation.pending_tokens, left)
            left -= batch[task]
        return batch

    def _make_room(self, pages: int) -> bool:
        """Have what is idle give way until ``pages`` are free; False if that does not suffice."""
        while pages > self._bench.runtime.pool.free_pages:
            if not self._residency.release_idle():
                return False
        return True
