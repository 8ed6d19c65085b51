"""A turn: a user's texts, pictures and videos, and the answer to them, as work for the engine.

A step encodes a picture or a video, runs a chunk of the prompt, or generates a token. Nothing is committed before the
last step is done: a turn that fails or is cancelled leaves the session unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from vflow_client.v1 import conversations_pb2, images_pb2
from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Encode, Op
from vflow_server.engine.piece_thread import PieceThread
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.kv.session_state import SessionState
from vflow_server.rpc.errors import InvalidRequest
from vflow_server.sessions.receipts import image_receipt
from vflow_server.sessions.work import check_context, items_of, persist, prefill, recall, tokenize, transaction
from vflow_server.store.answers import StoredAnswer
from vflow_server.store.session_record import Entry
from vflow_server.tuning.fidelity_monitor import FidelityMonitor
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import PictureError
from vflowopt.media.video import Video, Visual
from vflowopt.runtime.generate import FinishReason, decode
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import Tier
from vflowopt.runtime.sampling import Sampler, SamplingOptions
from vflowopt.runtime.sequence import tokens_per_stage
from vflowopt.search.replay import AnsweredTurn

Finished = conversations_pb2.Finished

_FINISH_REASONS = {
    FinishReason.STOP: Finished.STOP,
    FinishReason.STOP_STRING: Finished.STOP_STRING,
    FinishReason.LENGTH: Finished.LENGTH,
}


@dataclass(frozen=True)
class TurnRequest:
    """A checked request for a turn.

    Attributes:
        parts: texts, pictures and videos in the order given.
        max_new_tokens: number of tokens of the answer at most.
        sampling: how its tokens are drawn.
        stop: strings before which the answer ends.
        min_new_tokens: number of tokens before which the model cannot end the answer.
    """

    parts: tuple[str | Visual, ...]
    max_new_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0


def turn(
    runtime: Runtime,
    kv: KVCacheManager,
    images: ImageCache,
    tokenizer: PieceThread,
    state: SessionState,
    request: TurnRequest,
    emit: Callable[[str], None],
    *,
    session_name: str,
    strategy_name: str,
    accepted: float,
    monitor: FidelityMonitor,
    store_as: tuple[str, str] | None = None,
) -> Steps[Finished]:
    """Answer a turn: emits pieces of text and returns the contract's ``Finished``.

    Args:
        runtime: the model.
        kv: the KV caches.
        images: the cache of compressed pictures.
        tokenizer: tokenizes the texts.
        state: the session's state; no other work may be running in the session.
        request: the turn.
        emit: receives the answer piece by piece.
        session_name: resource name of the session.
        strategy_name: resource name of its strategy.
        accepted: ``time.perf_counter()`` when the request arrived.
        monitor: may compare the turn with the unpruned model afterwards.
        store_as: request_id and fingerprint to store the answer under; None: the answer is not stored.

    Raises:
        ServiceError: the log cannot be read or written; the context, the pool or the data folder has no space for the
            turn; or the model does not take one of the pictures or videos.
    """
    begun = time.perf_counter()
    yield from recall(kv, images, state)
    with transaction(kv, state) as checkpoint:
        sequence = state.sequence
        # Texts that are too long are refused before any picture is encoded.
        space = max(runtime.context - sequence.position - request.max_new_tokens, 0)
        texts = state.turn(request.parts, space)
        placed = yield from tokenize(tokenizer, state, texts, request.max_new_tokens, runtime.context)
        receipts, compressed = yield from _compress(runtime, state, request, session_name, strategy_name)
        items = items_of(placed, compressed)
        check_context(sequence, items, request.max_new_tokens, runtime.context)
        kv.check_room(state, items)
        (prompt_tokens,) = tokens_per_stage([*sequence.log, *items], 1)
        resident = not sequence.log or sequence.resident

        prefilled = yield from prefill(kv, state, items)
        prompt_ends = len(sequence.log)
        generated = yield from decode(
            sequence,
            runtime.chat,
            Sampler(request.sampling),
            max_new_tokens=request.max_new_tokens,
            min_new_tokens=request.min_new_tokens,
            stop=request.stop,
            emit=emit,
        )
        ended = time.perf_counter()
        prefilled = prefilled.then(generated.prefill)
        # More tokens than the prompt has were run if pages ran short and a part had to be run again.
        reused_tokens = max(prompt_tokens - prefilled.num_run, 0)
        if monitor.chooses(state.tenant, strategy_name, pictures=state.images + len(receipts)):
            # With min_new_tokens the most likely token may be banned, because it would end the answer too early.
            greedy = request.sampling.temperature == 0 and not request.min_new_tokens
            log = tuple(sequence.log)
            monitor.submit(AnsweredTurn(state.tenant, strategy_name, state.strategy, log, prompt_ends, greedy))
        first_token = generated.first_token
        finished = Finished(
            text=generated.text,
            finish_reason=_FINISH_REASONS[generated.finish_reason],
            usage=conversations_pb2.Usage(
                prompt_tokens=prompt_tokens, reused_tokens=reused_tokens, completion_tokens=generated.num_generated
            ),
            images=receipts,
            receipt=conversations_pb2.TurnReceipt(
                strategy=strategy_name,
                new_prompt_tokens=prefilled.num_run,
                reused_tokens=reused_tokens,
                kv_bytes=sequence.kv_bytes,
                kv_bytes_full=sequence.kv_bytes_full,
                queue_ms=(begun - accepted) * 1000,
                prefill_ms=(first_token - (prefilled.begun or first_token)) * 1000,
                first_token_ms=(first_token - accepted) * 1000,
                decode_ms=(ended - first_token) * 1000,
                total_ms=(ended - accepted) * 1000,
                restored=not resident,
                restored_from=conversations_pb2.TurnReceipt.RestoredFrom.Value(
                    "RESTORED_FROM_UNSPECIFIED" if resident else (prefilled.restored_from or Tier.LOG).name
                ),
            ),
        )
        entry = Entry(tuple(sequence.log[checkpoint.items :]), len(receipts), answered=True)
        yield from persist(state, entry, None if store_as is None else StoredAnswer(*store_as, finished))
        state.commit_turn(len(receipts))
    return finished


def _compress(
    runtime: Runtime, state: SessionState, request: TurnRequest, session_name: str, strategy_name: str
) -> Generator[Op, None, tuple[list[images_pb2.ImageReceipt], list[CompressedImage]]]:
    """Compress the pictures and videos of a turn, one after the other; returns their receipts, and what they became.

    Raises:
        InvalidRequest: the model does not take one of them.
    """
    receipts: list[images_pb2.ImageReceipt] = []
    compressed: list[CompressedImage] = []
    for index, part in enumerate(request.parts):
        if isinstance(part, str):
            continue
        op = Encode(part, state.strategy, state.tenant)
        try:
            yield op
        except PictureError as error:
            field = f"parts[{index}].{'video' if isinstance(part, Video) else 'image'}"
            raise InvalidRequest(error.reason, field, str(error), metadata=error.metadata) from error
        compressed.append(op.image)
        number = state.images + len(receipts) + 1
        receipts.append(
            image_receipt(
                part,
                op.image,
                runtime,
                state.strategy,
                strategy_name,
                cache_hit=op.cache_hit,
                name=f"{session_name}/images/{number}",
            )
        )
    return receipts, compressed
