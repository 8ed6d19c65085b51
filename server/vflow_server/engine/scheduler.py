"""The scheduler: chooses the ops that a step does, and the sequences that are evicted when KV pages run short.

Every step runs one batch of the model: one token of every running answer, and a bounded number of prompt tokens.
Pictures and videos are encoded beside the steps, in pieces (:mod:`vflow_server.engine.encoding_queue`). So neither a
long prompt nor a picture stalls other streams for more than a step. Tenants have equal shares of the prompt tokens;
within a tenant the order is first come, first served. Idle work advances by one piece when no other work needs the
model, and rarely while other work does. Belongs to the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from vflow_server.engine.batch import Batch, Scheduled
from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.encoding_queue import Asking, EncodingQueue
from vflow_server.engine.engine import Task
from vflow_server.engine.ops import Encode, Forward, Idle, Wait
from vflow_server.engine.token_meter import TokenMeter
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.telemetry.metrics import Metrics
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime

PROMPT_TOKENS = 512
"""Prompt tokens that a step runs at most, over all sequences; fewer behind a long context, where each takes longer (see
:meth:`Runtime.relative_cost`). Each tenant gets at least one."""

BESIDE_ANSWERS, SAVED = 25, 4
"""Beside the answers of other tenants, a tenant's prompts run in one of so many steps in the long run. So they show in
the longest gap between two tokens of an answer, but not in the 95th percentile. Steps that were not used are saved, for
so many prompts at once: one now and then does not wait."""

IDLE_EVERY = 32
"""Steps between two pieces of idle work when there is no idle time. Rare enough not to show in the 95th percentile of
the step times, and often enough for such work to finish."""


class Scheduler:
    """Does the ops that tasks wait for.

    Args:
        runtime: the model.
        kv: restores and evicts sequences.
        images: the cache of compressed pictures.
        encoder: compresses pictures that are not cached.
        metrics: counts the steps.
        meter: takes the tokens that are run and encoded from the tenants' allowances.
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
        self._metrics = metrics
        self._meter = meter
        self._encodings = EncodingQueue(images, encoder, meter)
        self._steps_without_idle_work = 0
        self._last_idle: Task | None = None
        self._saved = BESIDE_ANSWERS * SAVED  # steps without prompts beside the answers of other tenants

    def __call__(self, tasks: Sequence[Task], wake: Callable[[], None]) -> bool:
        """Run one step: do some of the ops of ``tasks``.

        Args:
            tasks: the tasks that wait for an op, in the order in which they began.
            wake: wakes the engine; called from any thread when another step may do more.

        Returns:
            Whether anything was done.
        """
        progress = self._encodings.finish()
        forwards: list[Scheduled] = []
        asking: list[Asking] = []
        waiting: list[tuple[Task, Wait]] = []
        idle: list[Task] = []
        for task in tasks:
            match task.op:
                case Forward() as op:
                    forwards.append(Scheduled(task, op, op.sequence.pending_tokens))
                case Encode() as op:
                    asking.append(Asking(task, op))
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
        if asking or self._encodings.under_way:
            answering = any(each.num_tokens == 1 for each in forwards)
            progress |= self._encodings.advance(asking, wake, answering=answering)
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

    def _run(self, forwards: Sequence[Scheduled]) -> None:
        """Run one batch.

        When pages run short, idle sequences are evicted first. Then the youngest running ones are preempted. Then the
        batch is reduced to its eldest sequence, which fails only if it needs more than the whole pool.
        """
        while True:
            begun, batch = time.perf_counter(), Batch()
            try:
                if (restored := self._restored(forwards[0])) is None:
                    return
                forwards = [restored, *forwards[1:]]
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

        Beside the answers of other tenants, prompts run in few of the steps (:data:`BESIDE_ANSWERS`).
        """
        batch = Batch()
        self._saved = min(self._saved + 1, BESIDE_ANSWERS * SAVED)
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
        answering = {each.task.tenant for each in batch}
        beside_others = [queue for queue in prompts.values() if answering - {queue[0].task.tenant}]
        if beside_others:
            if self._saved >= BESIDE_ANSWERS:
                self._saved -= BESIDE_ANSWERS
            else:
                for queue in beside_others:
                    del prompts[queue[0].task.tenant]
        left = float(PROMPT_TOKENS)
        # Tenants with the fewest tokens come first: the unused part of their share goes to the next ones.
        queues = sorted(prompts.values(), key=lambda queue: sum(each.num_tokens for each in queue))
        for served, queue in enumerate(queues):
            share = left / (len(queues) - served)
            for place, each in enumerate(queue):
                if share <= 0:
                    break
                scheduled = each
                if each is not eldest:
                    wanted = each.sequence.pages_wanted
                    if not self._kv.make_room(promised + wanted):
                        continue
                    if (restored := self._restored(each)) is None:
                        continue
                    scheduled = restored
                    promised += wanted
                cost = self._runtime.relative_cost(scheduled.sequence.cached.position)
                count = min(max(int(share / cost), int(not place)), scheduled.num_tokens)
                if not count:
                    break
                share -= count * cost
                left -= count * cost
                batch.add(scheduled, count)
        return batch

    def _restored(self, scheduled: Scheduled) -> Scheduled | None:
        """Restore the offloaded cache of a sequence, if there is one in memory.

        Returns:
            The task with its tokens counted anew; None if the restoring failed, and the task with it.

        Raises:
            PoolExhausted: too few pages are free.
        """
        try:
            tier = self._kv.restore(scheduled.sequence)
        except PoolExhausted:
            raise
        except Exception as failure:
            scheduled.task.fail(failure)
            return None
        if tier is None:
            return scheduled
        scheduled.op.restored_from = tier
        return scheduled.counted_again()
