"""The scheduler: chooses the ops that a step does, and the sequences that are evicted when KV pages run short.

Every step runs one batch of the model: one token of every running answer, and a bounded number of prompt tokens.
Pictures are encoded beside the steps, a few at a time. So neither a long prompt nor a picture stalls other streams for
more than a step. Tenants have equal shares of the prompt tokens and take turns with their pictures; within a tenant the
order is first come, first served. Idle work advances by one piece when no other work needs the model, and rarely while
other work does. Belongs to the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import takewhile

import torch

from vflow_server.engine.batch import Batch, Scheduled
from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.engine import Task
from vflow_server.engine.fair_queue import RoundRobin
from vflow_server.engine.ops import Encode, Forward, Idle, Wait
from vflow_server.engine.token_meter import TokenMeter
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.telemetry.metrics import Metrics
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import Picture
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime

PROMPT_TOKENS = 512
"""Prompt tokens that a step runs at most, over all sequences. Each tenant gets at least one."""

PICTURES = 4
"""Pictures that are encoded in one batch at most; only one while answers are being decoded."""

IDLE_EVERY = 32
"""Steps between two pieces of idle work when there is no idle time. Rare enough not to show in the 95th percentile of
the step times, and often enough for such work to finish."""


@dataclass(frozen=True, eq=False)
class _Asking:
    """A task that waits for a picture, and its op."""

    task: Task
    op: Encode

    @property
    def tenant(self) -> str:
        return self.task.tenant

    @property
    def waits(self) -> bool:
        """Whether the task still waits for the op; it may have been cancelled."""
        return self.task.op is self.op


@dataclass(frozen=True)
class _Encoding:
    """A batch of pictures that is being encoded."""

    asking: Sequence[_Asking]
    future: Future[list[CompressedImage]]


class Scheduler:
    """Does the ops that tasks wait for.

    Args:
        runtime: the model.
        kv: restores and evicts sequences.
        images: the cache of compressed pictures.
        encoder: compresses pictures that are not cached.
        metrics: counts the steps.
        meter: counts the tokens of each tenant.
    """

    def __init__(
        self,
        runtime: Runtime,
        kv: KVCacheManager,
        images: ImageCache,
        encoder: EncoderThread,
        metrics: Metrics,
        meter: TokenMeter,
    ) -> None:
        self._runtime = runtime
        self._kv = kv
        self._images = images
        self._encoder = encoder
        self._metrics = metrics
        self._meter = meter
        self._pictures = RoundRobin()
        self._encoding: _Encoding | None = None
        self._threads = torch.get_num_threads()
        self._steps_without_idle_work = 0
        self._last_idle: Task | None = None

    def __call__(self, tasks: Sequence[Task], wake: Callable[[], None]) -> bool:
        """Run one step: do some of the ops of ``tasks``.

        Args:
            tasks: the tasks that wait for an op, in the order in which they began.
            wake: wakes the engine; called from any thread when another step may do more.

        Returns:
            Whether anything was done.
        """
        progress = False
        if self._encoding is not None and self._encoding.future.done():
            self._finish_encoding(self._encoding, wake)
            progress = True
        forwards: list[Scheduled] = []
        asking: list[_Asking] = []
        waiting: list[tuple[Task, Wait]] = []
        idle: list[Task] = []
        for task in tasks:
            match task.op:
                case Forward() as op:
                    forwards.append(Scheduled(task, op, op.sequence.pending_tokens))
                case Encode() as op:
                    asking.append(_Asking(task, op))
                case Wait() as op:
                    waiting.append((task, op))
                case Idle():
                    idle.append(task)
        if idle:
            progress |= self._grant_idle_time(idle, needed=bool(forwards or asking))
        if waiting:
            progress |= self._finish_waiting(waiting, wake)
        if forwards:
            self._run(forwards)
            progress = True
        if asking:
            progress |= self._encode(asking, wake, answering=any(each.num_tokens == 1 for each in forwards))
        return progress

    def _grant_idle_time(self, idle: Sequence[Task], *, needed: bool) -> bool:
        """Let the next of the ``idle`` tasks run one piece, unless the model is ``needed`` for other work."""
        self._steps_without_idle_work += 1
        if needed and self._steps_without_idle_work < IDLE_EVERY:
            return False
        last = self._last_idle
        self._last_idle = idle[(idle.index(last) + 1) % len(idle) if last in idle else 0]
        self._last_idle.done()
        self._steps_without_idle_work = 0
        return True

    @staticmethod
    def _finish_waiting(waiting: Sequence[tuple[Task, Wait]], wake: Callable[[], None]) -> bool:
        """Finish the ops whose future is done; let the other futures wake the engine."""
        progress = False
        for task, op in waiting:
            if op.future.done():
                task.done()
                progress = True
            else:
                op.watch(wake)
        return progress

    def _encode(self, asking: Sequence[_Asking], wake: Callable[[], None], *, answering: bool) -> bool:
        """Hand out the pictures that are cached. Start to encode others, unless a batch is being encoded."""
        missing = []
        for each in asking:
            image = self._images.get((each.op.visual.identity, each.op.strategy, each.op.tenant))
            if image is None:
                missing.append(each)
            else:
                each.op.put(image, cache_hit=True)
                each.task.done()
        if missing and self._encoding is None:
            ordered = self._pictures.order(missing)
            first = ordered[0].op.strategy
            self._begin_encoding([each for each in ordered if each.op.strategy == first], wake, answering=answering)
        return len(missing) < len(asking)

    def _begin_encoding(self, asking: Sequence[_Asking], wake: Callable[[], None], *, answering: bool) -> None:
        """Start to encode the first few pictures in one batch; the same picture of a tenant is encoded once.

        A video is encoded alone, so that no picture of the same batch waits for its frames. Later batches do wait.
        """
        first = {(each.op.visual.identity, each.op.tenant): each for each in reversed(asking)}
        batch = [each for each in asking if each in first.values()]
        pictures = list(takewhile(lambda each: isinstance(each.op.visual, Picture), batch))
        batch = pictures[: 1 if answering else PICTURES] or batch[:1]
        for each in batch:
            self._pictures.served(each.tenant)
        # One thread is left to the answers.
        threads = max(self._threads - 1, 1) if answering else self._threads
        future = self._encoder.compress([each.op for each in batch], threads=threads)
        self._encoding = _Encoding(batch, future)
        future.add_done_callback(lambda _: wake())

    def _finish_encoding(self, encoded: _Encoding, wake: Callable[[], None]) -> None:
        """Cache the pictures of a finished batch, and hand them to the tasks that still wait for them."""
        self._encoding = None
        waiting = [each for each in encoded.asking if each.waits]
        failure = encoded.future.exception()
        if failure is None:
            for each, image in zip(encoded.asking, encoded.future.result(), strict=True):
                self._images.put((each.op.visual.identity, each.op.strategy, each.op.tenant), image)
                if each.waits:
                    each.op.put(image, cache_hit=False)
                    each.task.done()
        elif len(encoded.asking) > 1:
            if waiting:  # encode them one by one: only the faulty picture fails
                self._begin_encoding(waiting[:1], wake, answering=True)
        elif waiting:
            assert isinstance(failure, Exception)
            waiting[0].task.fail(failure)

    def _run(self, forwards: Sequence[Scheduled]) -> None:
        """Run one batch.

        When pages run short, idle sequences are evicted first. Then the youngest running ones are preempted. Then the
        batch is reduced to its eldest sequence, which fails only if it needs more than the whole pool.
        """
        while True:
            begun = time.perf_counter()
            try:
                if self._restore(forwards[0]):
                    forwards = [forwards[0].counted_again(), *forwards[1:]]
                batch = self._batch(forwards)
                tokens = self._runtime.step(batch.sequences, batch.limits, batch.samplers)
            except PoolExhausted as shortage:
                eldest = forwards[0]
                if self._kv.release_idle() or self._kv.preempt(eldest.sequence):
                    forwards = [each.counted_again() for each in forwards]
                elif len(forwards) > 1:
                    forwards = [eldest]
                else:
                    held = len(eldest.sequence.cache.owned_pages())
                    eldest.task.fail(self._kv.too_large(held + shortage.needed))
                    return
            except Exception as failure:
                if len(batch) > 1:  # run them one by one: only the faulty one fails
                    for each in batch:
                        self._run([each.counted_again()])
                else:
                    forwards[0].task.fail(failure)
                return
            else:
                self._metrics.step(time.perf_counter() - begun, batch.pending, batch.limits)
                for each, limit in zip(batch, batch.limits, strict=True):
                    self._meter.add(each.task.tenant, limit)
                batch.finish(tokens, begun)
                return

    def _batch(self, forwards: Sequence[Scheduled]) -> Batch:
        """The batch of this step: the eldest sequence, every answer, and prompts up to their bound.

        A prompt other than the eldest's runs only if there are pages for all of it beside the batch. So two prompts
        never keep taking each other's pages, and the eldest always advances.
        """
        batch = Batch()
        prompts: dict[str, list[Scheduled]] = {}
        for each in forwards:
            if each.num_tokens == 1:
                batch.add(each, 1)
            else:
                prompts.setdefault(each.task.tenant, []).append(each)
        if not prompts:
            return batch
        eldest = forwards[0]
        promised = sum(each.sequence.pages_wanted for each in {eldest, *batch})
        left = PROMPT_TOKENS
        # Tenants with the fewest tokens come first: the unused part of their share goes to the next ones.
        queues = sorted(prompts.values(), key=lambda queue: sum(each.num_tokens for each in queue))
        for served, queue in enumerate(queues):
            share = max(left // (len(queues) - served), 1)
            for each in queue:
                if not share:
                    break
                scheduled = each
                if each is not eldest:
                    wanted = each.sequence.pages_wanted
                    if not self._kv.make_room(promised + wanted):
                        continue
                    if self._restore(each):
                        scheduled = each.counted_again()
                    promised += wanted
                share -= (count := min(scheduled.num_tokens, share))
                left -= count
                batch.add(scheduled, count)
        return batch

    def _restore(self, scheduled: Scheduled) -> bool:
        """Restore the offloaded cache of a sequence, if there is one in memory; returns whether it did."""
        tier = self._kv.restore(scheduled.sequence)
        if tier is not None:
            scheduled.op.restored_from = tier
        return tier is not None
