"""The parts of all work in a session: recall the log, prefill new items, persist them, all within one transaction.

Two kinds of work that need little more are here, too: adding a picture before its question, and a fork.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from vflow_client.v1 import conversations_pb2, images_pb2
from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Encode, Wait
from vflow_server.engine.piece_thread import PieceThread
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.kv.session_state import Placed, SessionState
from vflow_server.rpc.errors import InvalidRequest
from vflow_server.sessions.receipts import image_receipt
from vflow_server.store.answers import StoredAnswer
from vflow_server.store.session_record import Entry
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.video import Visual
from vflowopt.runtime.chat import TextTooLong
from vflowopt.runtime.generate import Forward
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import Tier
from vflowopt.runtime.sequence import Checkpoint, Item, Sequence, span


@contextmanager
def transaction(kv: KVCacheManager, state: SessionState) -> Iterator[Checkpoint]:
    """Count a session as in use within the block, and roll its sequence back if the block raises.

    Cancelled work ends with GeneratorExit, which rolls back as well.
    """
    with kv.using(state):
        checkpoint = state.sequence.checkpoint()
        try:
            yield checkpoint
        except BaseException:
            state.sequence.rollback(checkpoint)
            raise


def recall(kv: KVCacheManager, images: ImageCache, state: SessionState) -> Steps[None]:
    """Read the log of a session that an earlier process stored, unless it is in memory.

    Raises:
        ServiceError: the log cannot be read, or it does not fit in memory.
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
        kv.check_room(state, [item for entry in entries for item in entry.items])
        state.recall(entries)


def tokenize(
    tokenizer: PieceThread,
    state: SessionState,
    pieces: Pieces[list[Placed]],
    max_new_tokens: int,
    context: int,
) -> Steps[list[Placed]]:
    """Tokenize the texts of a turn or what surrounds a picture, and check that they fit in the model's context.

    Args:
        tokenizer: the thread that tokenizes.
        state: the session's state.
        pieces: its :meth:`SessionState.turn` or :meth:`SessionState.picture`.
        max_new_tokens: tokens of the answer at most.
        context: positions in the model's context.

    Returns:
        Tokens, with pictures and videos in their places, not compressed yet.

    Raises:
        InvalidRequest: CONTEXT_EXCEEDED.
    """
    tokenizing = tokenizer.submit(pieces, state.tenant)
    try:
        yield Wait(tokenizing)
    except GeneratorExit:
        tokenizing.cancel()
        raise
    try:
        placed = tokenizing.result()
    except TextTooLong as error:
        raise context_exceeded(state.sequence.position, error.tokens, max_new_tokens, context) from error
    check_context(state.sequence, [item for item in placed if isinstance(item, int)], max_new_tokens, context)
    return placed


def items_of(placed: abc.Sequence[Placed], images: Iterable[CompressedImage]) -> list[Item]:
    """The items of a log: ``placed``, with ``images`` in order in the places of pictures and videos."""
    compressed = iter(images)
    return [item if isinstance(item, int) else next(compressed) for item in placed]


def persist(state: SessionState, entry: Entry, answer: StoredAnswer | None = None) -> Steps[None]:
    """Write an entry of the log to the disk, if the session has a record. Call this within a :func:`transaction`.

    Args:
        state: the session's state.
        entry: the items that the transaction added to the log.
        answer: the answer to store with it, if any.

    Raises:
        ServiceError: STORAGE_FAILED, SESSION_DELETED, or CAPACITY_EXHAUSTED if the data folder is full.
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
    """What a prefill took.

    Attributes:
        num_run: tokens that the model had to run.
        begun: ``time.perf_counter()`` when the first of them began to run; None if nothing had to run.
        restored_from: the tier from which the offloaded cache of the sequence was restored; None if it was not.
    """

    num_run: int = 0
    begun: float | None = None
    restored_from: Tier | None = None

    def then(self, op: Forward) -> PrefillResult:
        """The sum of this result and the op that ran next."""
        return PrefillResult(
            self.num_run + op.num_run,
            op.begun if self.begun is None else self.begun,
            self.restored_from or op.restored_from,
        )


def prefill(kv: KVCacheManager, state: SessionState, items: abc.Sequence[Item]) -> Steps[PrefillResult]:
    """Append ``items`` to a session's log, and share the longest cached prefix if nothing of the session is cached.

    While no turn is finished, other sessions of the tenant may begin with the same items. So the sequence is run up to
    its last picture and cached as a prefix. Items that are not run are left to the caller. Call this within a
    :func:`transaction`.

    Args:
        kv: the KV caches.
        state: the session's state.
        items: the items to append.

    Returns:
        What was run; all zero if nothing was.

    Raises:
        CapacityExhausted: the sequence needs more pages than the pool has.
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
        # Run up to the last picture only: other sessions may begin with it and ask something else.
        sequence.log.extend(rest[: pictures[-1] + 1])
        op = Forward(sequence)
        yield op
        result = result.then(op)
        kv.prefixes.put(tenant, sequence)
        rest = rest[pictures[-1] + 1 :]
    sequence.log.extend(rest)
    return result


def read_offloaded(kv: KVCacheManager, sequence: Sequence) -> Steps[None]:
    """Read the offloaded cache of a sequence into memory, if only a file holds it."""
    if not sequence.resident and (reading := kv.offloaded.read_ahead(sequence)) is not None:
        yield Wait(reading)
        kv.offloaded.put_read(sequence, reading)


def add_image(
    runtime: Runtime,
    kv: KVCacheManager,
    images: ImageCache,
    tokenizer: PieceThread,
    state: SessionState,
    visual: Visual,
    *,
    session_name: str,
    strategy_name: str,
    store_as: tuple[str, str] | None = None,
) -> Steps[images_pb2.ImageReceipt]:
    """Encode a picture or a video and prefill it, before its question; returns the receipt.

    Args:
        runtime: the model.
        kv: the KV caches.
        images: the cache of compressed pictures.
        tokenizer: tokenizes what surrounds the picture.
        state: the session's state; no other work may be running in the session.
        visual: the picture or video.
        session_name: resource name of the session.
        strategy_name: resource name of its strategy.
        store_as: request_id and fingerprint to store the receipt under; None: it is not stored.

    Raises:
        ServiceError: the log cannot be read or written, or the context, the pool or the data folder has no space for
            the picture.
        PictureError: the model does not take it.
    """
    yield from recall(kv, images, state)
    with transaction(kv, state):
        placed = yield from tokenize(tokenizer, state, state.picture(visual), 0, runtime.context)
        op = Encode(visual, state.strategy, state.tenant)
        yield op
        items = items_of(placed, [op.image])
        check_context(state.sequence, items, 0, runtime.context)
        kv.check_room(state, items)
        result = yield from prefill(kv, state, items)
        if state.sequence.pending_tokens:
            rest = Forward(state.sequence)
            yield rest
            result = result.then(rest)
        runtime.synchronize()
        prefill_ms = 0.0 if result.begun is None else (time.perf_counter() - result.begun) * 1000
        receipt = image_receipt(
            visual,
            op.image,
            runtime,
            state.strategy,
            strategy_name,
            cache_hit=op.cache_hit,
            name=f"{session_name}/images/{state.images + 1}",
            prefill_ms=prefill_ms,
        )
        answer = None if store_as is None else StoredAnswer(*store_as, shown(receipt))
        yield from persist(state, Entry(tuple(items), images=1, answered=False), answer)
        state.commit_picture(op.image, len(items))
    return receipt


def shown(receipt: images_pb2.ImageReceipt) -> conversations_pb2.Finished:
    """The answer to a picture that is added ahead of its question, as it is stored: a turn without text."""
    return conversations_pb2.Finished(images=[receipt])


def fork(kv: KVCacheManager, images: ImageCache, origin: SessionState, twin: SessionState) -> Steps[None]:
    """Copy the log and the KV cache of ``origin`` to ``twin``, a new session; pages are shared.

    No other work may be running in either.

    Raises:
        ServiceError: the log cannot be read or written.
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
    """Check that ``items`` and an answer of ``max_new_tokens`` fit behind a sequence in the model's context.

    Raises:
        InvalidRequest: CONTEXT_EXCEEDED; more than ``context`` positions are needed.
    """
    position, new = sequence.position, sum(map(span, items))
    if position + new + max_new_tokens > context:
        raise context_exceeded(position, new, max_new_tokens, context)


def context_exceeded(position: int, new: int, max_new_tokens: int, context: int) -> InvalidRequest:
    """The error for a turn of at least ``new`` positions that does not fit in the context."""
    return InvalidRequest(
        "CONTEXT_EXCEEDED",
        "parts",
        f"the conversation takes {position} positions, this turn {new} or more and its answer up to {max_new_tokens}: "
        f"more than the model's {context}. Say less, lower max_new_tokens, or begin a new session",
        metadata={
            "position": position,
            "new_tokens": new,
            "max_new_tokens": max_new_tokens,
            "context": context,
        },
    )


def _on_host(items: abc.Sequence[Item]) -> tuple[Item, ...]:
    """The same items with embeddings in host memory, for a thread that must not use a device."""
    return tuple(
        replace(item, embeddings=item.embeddings.cpu())
        if isinstance(item, CompressedImage) and item.embeddings.device.type != "cpu"
        else item
        for item in items
    )
