"""The scheduler: which needs of the running work are met in a step, and what gives way when KV pages run short.

Every step runs one batch of the model: one token of every answer that is under way and a bounded number of tokens of
prompts. Pictures are encoded beside the steps, a few at a time. So neither a long prompt nor a picture stalls the
streams of others for more than a step. Tenants have equal shares of the prompt tokens and take turns with their
pictures; within a tenant it is first come, first served. Work in spare time gets on by one piece when nobody else
needs the model, and rarely beside others. Belongs to the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch

from vflow_server.engine.engine import Task
from vflow_server.engine.fair_queue import RoundRobin
from vflow_server.engine.ops import Encode, Forward, Idle, Wait
from vflow_server.engine.workbench import Workbench
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import Picture
from vflowopt.runtime.cache import PoolExhausted

PROMPT_TOKENS = 512
"""Tokens of prompts that a step runs at most, over all sequences (and one of each tenant at least)."""

PICTURES = 4
"""Pictures that a step encodes at most; one only while answers are under way."""

PATIENCE = 0.005
"""Seconds to wait for a file or a picture, at a time, while there is nothing else to do."""

SPARE_EVERY = 32
"""Steps of sequences for each piece of work in spare time, where there is no spare time: so rare that the 95th
percentile of the steps does not notice, and yet such work comes to an end."""

Needing = Task[Any, Any]


def _pending(task: Needing) -> int:
    tokens: int = task.need.sequence.pending_tokens
    return tokens


@dataclass(frozen=True)
class _Encoding:
    """A batch of pictures that is being encoded: who asked, for what, and what becomes of it."""

    tasks: Sequence[Needing]
    needs: Sequence[Encode]
    future: Future[list[CompressedImage]]


class Scheduler:
    """Meets the needs of work.

    Args:
        bench: the model, and what it has at hand.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._kv = bench.kv
        self._pictures = RoundRobin()
        self._under_way: _Encoding | None = None
        self._threads = torch.get_num_threads()
        self._steps_without_spare = 0
        self._spared: Needing | None = None

    def __call__(self, tasks: Sequence[Needing]) -> None:
        """One step: meet the needs of some of ``tasks``, which come in the order in which they began."""
        running = [task for task in tasks if isinstance(task.need, Forward)]
        awaiting = [task for task in tasks if isinstance(task.need, Wait)]
        spared = self._spare(tasks)
        self._await_others(awaiting, patience=0 if running or spared else PATIENCE)
        answering = any(_pending(task) == 1 for task in running)
        self._run(running)
        encoding = [task for task in tasks if isinstance(task.need, Encode) and not self._at_hand(task)]
        if encoding and self._under_way is None:
            encoding = self._pictures.order(encoding)
            self._encode([task for task in encoding if task.need.strategy == encoding[0].need.strategy], answering)

    def _spare(self, tasks: Sequence[Needing]) -> bool:
        """Let the next of those that wait for spare time go on by one piece, if it is time for that."""
        spare = [task for task in tasks if isinstance(task.need, Idle)]
        needed = any(isinstance(task.need, Forward | Encode) for task in tasks)
        self._steps_without_spare += 1
        if not spare or (needed and self._steps_without_spare < SPARE_EVERY):
            return False
        self._spared = spare[(spare.index(self._spared) + 1) % len(spare) if self._spared in spare else 0]
        self._spared.answer(None)
        self._steps_without_spare = 0
        return True

    def _await_others(self, awaiting: Sequence[Needing], patience: float) -> None:
        """Answer those whose file has been read or whose picture is encoded; wait a little for the first of them."""
        futures: list[Future[Any]] = [task.need.future for task in awaiting]
        if self._under_way is not None:
            futures.append(self._under_way.future)
        if not futures:
            return
        wait(futures, patience, FIRST_COMPLETED)
        for task in awaiting:
            if task.need.future.done():
                task.answer(None)
        if self._under_way is not None and self._under_way.future.done():
            self._encoded(self._under_way)

    def _at_hand(self, task: Needing) -> bool:
        """Answer with a picture that was compressed before, if there is one."""
        image = self._bench.held(task.need)
        if image is not None:
            task.answer((image, True))
        return image is not None

    def _encode(self, tasks: Sequence[Needing], answering: bool) -> None:
        """Begin to encode the first few pictures in one batch; the same picture of a tenant is encoded once.

        A video is encoded by itself: no picture of the same batch waits for its frames. What comes later does.
        """
        first = {(task.need.visual.identity, task.need.tenant): task for task in reversed(tasks)}
        batch = [task for task in tasks if task in first.values()]
        pictures = list(takewhile(lambda task: isinstance(task.need.visual, Picture), batch))
        batch = pictures[: 1 if answering else PICTURES] or batch[:1]
        for task in batch:
            self._pictures.served(task.tenant)
        # Answers that are under way keep a thread to themselves.
        threads = max(self._threads - 1, 1) if answering else self._threads
        needs = [task.need for task in batch]
        self._under_way = _Encoding(batch, needs, self._bench.compress(needs, threads=threads))

    def _encoded(self, done: _Encoding) -> None:
        """Hand out the pictures of a batch that has been encoded, to those who still wait for them."""
        self._under_way = None
        waiting = [(task, need) for task, need in zip(done.tasks, done.needs, strict=True) if task.need is need]
        if (failure := done.future.exception()) is None:
            images = done.future.result()
            self._bench.keep(done.needs, images)
            for task, need in waiting:
                task.answer((images[done.needs.index(need)], False))
        elif len(done.tasks) == 1:
            for task, _ in waiting:
                task.fail(cast(Exception, failure))
        elif waiting:  # whose picture it was shows when the first is encoded alone
            self._encode([task for task, _ in waiting[:1]], answering=True)

    def _run(self, tasks: Sequence[Needing]) -> None:
        """Run one batch.

        Where pages run short, what is idle gives way first, then the youngest in use, then all but the eldest of the
        batch; that one is refused only where it needs more than the whole pool.
        """
        while tasks:
            eldest, batch = tasks[0], self._batch(tasks)
            try:
                self._restore(eldest)
                pending = [_pending(task) for task in batch]
                begun = time.perf_counter()
                logits = self._bench.runtime.advance(
                    [task.need.sequence for task in batch],
                    list(batch.values()),
                    want_logits=any(task.need.want_logits for task in batch),
                )
            except PoolExhausted as shortage:
                if self._kv.release_idle() or self._kv.preempt(eldest.need.sequence):
                    continue
                if len(batch) > 1:
                    tasks = [eldest]
                    continue
                held = len(eldest.need.sequence.cache.owned_pages())
                eldest.fail(self._kv.too_large(held + shortage.needed))
                tasks = [task for task in tasks if task is not eldest]
            except Exception as failure:
                if len(batch) > 1:  # whose fault it was shows when each is run alone
                    for task in batch:
                        self._run([task])
                else:
                    eldest.fail(failure)
                return
            else:
                self._bench.metrics.step(time.perf_counter() - begun, pending, list(batch.values()))
                for task, before, row in zip(batch, pending, logits, strict=True):
                    sequence = task.need.sequence
                    task.need.ran += before - _pending(task)
                    task.need.begun = task.need.begun or begun
                    if sequence.num_cached_items == len(sequence.log):
                        task.answer(row if task.need.want_logits else None)
                return

    def _batch(self, tasks: Sequence[Needing]) -> dict[Needing, int]:
        """Who runs in this step, and how many tokens of each: the eldest of ``tasks``, every answer, and prompts.

        A prompt that is not the eldest's runs only when there is room for all of it beside the batch: so two never keep
        taking each other's pages, and the eldest always gets on.
        """
        batch = {task: 1 for task in tasks if _pending(task) == 1}
        promised = sum(task.need.sequence.pages_wanted for task in {tasks[0], *batch})
        prompts: dict[str, list[Needing]] = {}
        for task in tasks:
            if task not in batch:
                prompts.setdefault(task.tenant, []).append(task)
        left = PROMPT_TOKENS
        # Who asks for least comes first: what a tenant leaves of its share falls to those after it.
        for served, line in enumerate(sorted(prompts.values(), key=lambda line: sum(map(_pending, line)))):
            share = max(left // (len(prompts) - served), 1)
            for task in line:
                if not share:
                    break
                if task is not tasks[0]:
                    if not self._kv.make_room(promised + task.need.sequence.pages_wanted):
                        continue
                    self._restore(task)
                    promised += task.need.sequence.pages_wanted
                batch[task] = min(_pending(task), share)
                share -= batch[task]
                left -= batch[task]
        return batch

    def _restore(self, task: Needing) -> None:
        task.need.restored = self._kv.restore(task.need.sequence) or task.need.restored
