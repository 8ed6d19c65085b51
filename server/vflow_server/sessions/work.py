"""What work in a session is made of: recall its past, prefill what is new, persist it, all of it or nothing.

And the two pieces of work that are little more than that: a picture ahead of its question, and a fork.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from vflow_client.v1 import images_pb2
from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Encode, Wait
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.kv.session_state import SessionState
from vflow_server.rpc.errors import InvalidRequest
from vflow_server.sessions.receipts import image_receipt
from vflow_server.store.answers import StoredAnswer
from vflow_server.store.session_record import Entry
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.video import Visual
from vflowopt.runtime.generate import Forward
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import Tier
from vflowopt.runtime.sequence import Checkpoint, Item, Sequence, span


@contextmanager
def transaction(kv: KVCacheManager, state: SessionState) -> Iterator[Checkpoint]:
    """Count a session as in use, and have its sequence as it was before unless the block comes to its end.

    GeneratorExit, which is how cancelled work ends, rolls back like any failure.
    """
    with kv.using(state):
        checkpoint = state.sequence.checkpoint()
        try:
            yield checkpoint
        except BaseException:
            state.sequence.rollback(checkpoint)
            raise


def recall(kv: KVCacheManager, images: ImageCache, state: SessionState) -> Steps[None]:
    """Have the log of a session in memory, which may be of an earlier process.

    Raises:
        ServiceError: it cannot be read, or its pictures do not fit in memory.
    """
    if state.recalled or state.record is None:
        return
    with kv.using(state):
        reading = state.record.read()
        yield Wait(reading)
        entries = [
            replace(
                entry,
                items=tuple(
                    images.intern(item, state.strategy, state.tenant) if isinstance(item, CompressedImage) else item
                    for item in entry.items
                ),
            )
            for entry in reading.result()
        ]
        kv.check_room(state.sequence, [item for entry in entries for item in entry.items])
        state.recall(entries)


def persist(state: SessionState, entry: Entry, answer: StoredAnswer | None = None) -> Steps[None]:
    """Have what was said on the disk, if the session has a record. To be called within a :func:`transaction`.

    Raises:
        ServiceError: it cannot be written.
    """
    if state.record is None:
        return
    writing = state.record.write(replace(entry, items=_on_host(entry.items)), answer)
    try:
        yield Wait(writing)
    except GeneratorExit:
        if not writing.cancel():
            state.record.take_back()
        raise
    writing.result()
    state.record.commit()


@dataclass(frozen=True)
class PrefillResult:
    """What it took to cache what a session said before its last steps.

    Attributes:
        num_run: tokens that the model had to run.
        begun: ``time.perf_counter()`` when the model first ran any of it; None if nothing had to run.
        restored_from: where an offloaded cache came back from for it, if one did.
    """

    num_run: int = 0
    begun: float | None = None
    restored_from: Tier | None = None

    def then(self, op: Forward) -> PrefillResult:
        """The same with another step behind it."""
        return PrefillResult(
            self.num_run + op.num_run,
            op.begun if self.begun is None else self.begun,
            self.restored_from or op.restored_from,
        )


def prefill(kv: KVCacheManager, state: SessionState, items: abc.Sequence[Item]) -> Steps[PrefillResult]:
    """Append ``items`` to a session's log and cache it up to its last picture, from a shared prefix where one is held.

    What follows the last picture is left to run. To be called within a :func:`transaction`.

    Args:
        kv: the KV caches.
        state: of the session whose log grows.
        items: what is said. While no turn is finished the tenant's other sessions may begin the same way: then
            pictures make prefixes to share.

    Raises:
        CapacityExhausted: pages are short though everything was released that can be.
    """
    sequence, tenant = state.sequence, state.tenant
    log = [*sequence.log, *items]
    yield from read_offloaded(kv, sequence)
    nothing_cached = not sequence.resident and not kv.offloaded.holds(sequence)
    if nothing_cached and any(isinstance(item, CompressedImage) for item in log):
        prefix = kv.find_prefix(tenant, sequence.strategy, log)
        if prefix is not None:
            sequence.log.extend(log[len(sequence.log) : len(prefix.log)])
            sequence.share(prefix)
    rest = log[len(sequence.log) :]
    result = PrefillResult()
    pictures = [place for place, item in enumerate(rest) if isinstance(item, CompressedImage)]
    if not state.turns and pictures:
        # Stop behind the last picture, for others who begin with it and ask something else.
        sequence.log.extend(rest[: pictures[-1] + 1])
        op = Forward(sequence)
        yield op
        result = result.then(op)
        kv.prefixes.put(tenant, sequence)
        rest = rest[pictures[-1] + 1 :]
    sequence.log.extend(rest)
    return result


def read_offloaded(kv: KVCacheManager, sequence: Sequence) -> Steps[None]:
    """Have an offloaded cache of a sequence in memory, where one is held in a file."""
    if not sequence.resident and (reading := kv.offloaded.read_ahead(sequence)) is not None:
        yield Wait(reading)
        kv.offloaded.put_read(sequence, reading)


def add_image(
    runtime: Runtime,
    kv: KVCacheManager,
    images: ImageCache,
    state: SessionState,
    visual: Visual,
    *,
    session_name: str,
    strategy_name: str,
) -> Steps[images_pb2.ImageReceipt]:
    """Encode a picture or a video and prefill it, ahead of its question; returns the receipt.

    Args:
        runtime: the model.
        kv: the KV caches.
        images: the compressed pictures.
        state: of the session; nothing else may be under way in it.
        visual: the picture or video.
        session_name: the session's resource name.
        strategy_name: resource name of its strategy.

    Raises:
        ServiceError: the context, the pool or the disk has no room for it.
        PictureError: the model does not take it.
    """
    yield from recall(kv, images, state)
    with transaction(kv, state):
        op = Encode(visual, state.strategy, state.tenant)
        yield op
        items = state.picture(op.image)
        check_context(state.sequence, items, 0, runtime.context)
        kv.check_room(state.sequence, items)
        result = yield from prefill(kv, state, items)
        if state.sequence.pending_tokens:
            rest = Forward(state.sequence)
            yield rest
            result = result.then(rest)
        runtime.synchronize()
        prefill_ms = 0.0 if result.begun is None else (time.perf_counter() - result.begun) * 1000
        yield from persist(state, Entry(tuple(items), images=1, answered=False))
        state.commit_picture(op.image, len(items))
    return image_receipt(
        visual,
        op.image,
        runtime,
        state.strategy,
        strategy_name,
        cache_hit=op.cache_hit,
        name=f"{session_name}/images/{state.images}",
        prefill_ms=prefill_ms,
    )


def fork(kv: KVCacheManager, images: ImageCache, origin: SessionState, twin: SessionState) -> Steps[None]:
    """Give ``twin``, which is new and unused, the past of ``origin``; nothing else may be under way in either.

    Raises:
        ServiceError: the past cannot be read or written.
    """
    yield from recall(kv, images, origin)
    with kv.using(origin), kv.using(twin):
        if origin.record is not None and twin.record is not None:
            writing = twin.record.fork(origin.record)
            yield Wait(writing)
            writing.result()
        yield from read_offloaded(kv, origin.sequence)
        kv.fork(origin, twin)


def check_context(sequence: Sequence, items: abc.Sequence[Item], max_new_tokens: int, context: int) -> None:
    """Refuse what the model has no positions for.

    Raises:
        InvalidRequest: CONTEXT_EXCEEDED.
    """
    position, new = sequence.position, sum(map(span, items))
    if position + new + max_new_tokens > context:
        raise InvalidRequest(
            "CONTEXT_EXCEEDED",
            "parts",
            f"the conversation takes {position} positions, this turn {new} and its answer up to {max_new_tokens}: "
            f"more than the model's {context}. Say less, lower max_new_tokens, or begin a new session",
            metadata={
                "position": position,
                "new_tokens": new,
                "max_new_tokens": max_new_tokens,
                "context": context,
            },
        )


def _on_host(items: abc.Sequence[Item]) -> tuple[Item, ...]:
    """The same items for another thread, which must start nothing on a device."""
    return tuple(
        replace(item, embeddings=item.embeddings.cpu())
        if isinstance(item, CompressedImage) and item.embeddings.device.type != "cpu"
        else item
        for item in items
    )
