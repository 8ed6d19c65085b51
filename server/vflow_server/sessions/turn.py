"""A turn: what a user says and shows, and the answer, as work for the engine.

One step encodes a picture or a video, runs a piece of the prompt, or generates a token. Until the last step is done
nothing is committed: a turn that fails or is cancelled leaves the conversation as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vflow_client.v1 import conversations_pb2, images_pb2
from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Encode, Forward
from vflow_server.engine.workbench import Workbench
from vflow_server.kv.session_state import SessionState
from vflow_server.rpc.errors import InvalidRequest
from vflow_server.sessions.reading import read
from vflow_server.sessions.receipts import image_receipt
from vflow_server.sessions.recording import recall, write_down
from vflow_server.store.replays import Answer
from vflow_server.store.session_record import Entry
from vflow_server.tuning.fidelity_monitor import FidelityMonitor
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import PictureError
from vflowopt.media.video import Video, Visual
from vflowopt.runtime.detokenize import TextStream
from vflowopt.runtime.offload import Tier
from vflowopt.runtime.sampling import Sampler, SamplingOptions, sample
from vflowopt.runtime.sequence import Item, Sequence, span, tokens_per_stage
from vflowopt.search.replay import AnsweredTurn

Finished = conversations_pb2.Finished


@dataclass(frozen=True)
class TurnRequest:
    """A user turn, checked.

    Attributes:
        parts: text, pictures and videos in the order given.
        max_new_tokens: tokens of the answer at most.
        sampling: how its tokens are drawn.
        stop: the answer ends before any of these.
        min_new_tokens: tokens before which the model cannot end the answer.
    """

    parts: tuple[str | Visual, ...]
    max_new_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0


class Turn:
    """The work of one turn. Emits pieces of text; its result is the contract's ``Finished``.

    Args:
        bench: the engine's things.
        state: whose turn it is; nothing else may be under way in it.
        session_name: the session's resource name.
        strategy_name: resource name of the dialogue's strategy.
        request: what was said and how to answer.
        accepted: ``time.perf_counter()`` when the request came.
        fidelity_monitor: may look at the turn afterwards.
        keep_as: the request_id and the fingerprint under which the answer is kept; None: it is not kept.
    """

    def __init__(
        self,
        bench: Workbench,
        state: SessionState,
        session_name: str,
        strategy_name: str,
        request: TurnRequest,
        accepted: float,
        fidelity_monitor: FidelityMonitor | None = None,
        keep_as: tuple[str, str] | None = None,
    ) -> None:
        self._bench = bench
        self._dialogue = state
        self._session_name = session_name
        self._strategy_name = strategy_name
        self._request = request
        self._accepted = accepted
        self._fidelity_monitor = fidelity_monitor
        self._keep_as = keep_as

    def __call__(self, emit: Callable[[str], None]) -> Steps[Finished]:
        """The steps of the turn."""
        begun = time.perf_counter()
        with self._bench.kv.using(self._dialogue):
            yield from recall(self._bench, self._dialogue)
            sequence = self._dialogue.sequence(self._bench.runtime)
            checkpoint = sequence.checkpoint()
            try:
                images, parts = yield from self._compressed()
                finished = yield from self._answered(sequence, parts, emit)
                finished.images.extend(images)
                finished.receipt.queue_ms = (begun - self._accepted) * 1000
                said = Entry(tuple(sequence.log[checkpoint.items :]), len(images), answered=True)
                yield from write_down(self._dialogue, said, self._kept(finished))
            except BaseException:  # GeneratorExit is how a cancelled turn ends
                sequence.rollback(checkpoint)
                raise
            self._dialogue.commit_turn(len(images))
        return finished

    def _kept(self, finished: Finished) -> Answer | None:
        return None if self._keep_as is None else Answer(*self._keep_as, finished)

    def _compressed(
        self,
    ) -> Steps[tuple[list[images_pb2.ImageReceipt], list[str | CompressedImage]]]:
        """Compress the turn's pictures and videos, one a step.

        Raises:
            InvalidRequest: the model does not take one of them.
        """
        receipts: list[images_pb2.ImageReceipt] = []
        parts: list[str | CompressedImage] = []
        for index, part in enumerate(self._request.parts):
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                image, hit = yield Encode(part, self._dialogue.strategy, self._dialogue.tenant)
            except PictureError as error:
                field = f"parts[{index}].{'video' if isinstance(part, Video) else 'image'}"
                raise InvalidRequest(error.reason, field, str(error), metadata=error.metadata) from error
            parts.append(image)
            number = self._dialogue.images + len(receipts) + 1
            receipts.append(
                image_receipt(
                    part,
                    image,
                    self._bench.runtime,
                    self._dialogue.strategy,
                    self._strategy_name,
                    cache_hit=hit,
                    name=f"{self._session_name}/images/{number}",
                )
            )
        return receipts, parts

    def _answered(
        self, sequence: Sequence, parts: list[str | CompressedImage], emit: Callable[[str], None]
    ) -> Steps[Finished]:
        """Run the prompt, then generate a token a step."""
        runtime = self._bench.runtime
        items = self._dialogue.turn(runtime.chat, parts)
        check_context(sequence, items, self._request.max_new_tokens, runtime.context)
        self._bench.kv.check_room(sequence, items)
        (prompt_tokens,) = tokens_per_stage([*sequence.log, *items], 1)
        resident = not sequence.log or sequence.resident

        reading = yield from read(self._bench, self._dialogue, items)
        logits, ran = reading.logits, reading.ran
        assert logits is not None  # they were wanted
        # More than the prompt has may have been run, where pages ran short and some had to be run again.
        reused_tokens = max(prompt_tokens - ran, 0)
        answer_begins, first_token = len(sequence.log), 0.0
        sampler = Sampler(self._request.sampling)
        text = TextStream(runtime.chat, self._request.stop)
        reason = Finished.FINISH_REASON_UNSPECIFIED
        generated = 0
        while True:
            sampler.banned = runtime.chat.stop_ids if generated < self._request.min_new_tokens else ()
            (token,) = sample(logits[None], [sampler])
            generated += 1
            if generated == 1:
                first_token = time.perf_counter()  # the token is known: so the prefill has ended on any device
            if token in runtime.chat.stop_ids:
                reason = Finished.STOP  # the token is not logged: the next turn closes this answer
                break
            if delta := text.push(token):
                emit(delta)
            if text.stopped or generated == self._request.max_new_tokens:
                reason = Finished.STOP_STRING if text.stopped else Finished.LENGTH
                sequence.log.append(token)  # said, but nothing follows yet that needs it run
                break
            sequence.log.append(token)
            logits = yield Forward(sequence)
        if delta := text.finish():
            emit(delta)
        if text.stopped:  # what was held back completed a stop string
            reason = Finished.STOP_STRING
        if text.stopped:  # the model shall not remember what nobody was shown
            sequence.truncate(answer_begins + text.tokens_shown)
        ended = time.perf_counter()
        if self._fidelity_monitor is not None and self._fidelity_monitor.chooses():
            self._fidelity_monitor.take(self._as_answered(sequence, answer_begins))
        return Finished(
            text=text.text,
            finish_reason=reason,
            usage=conversations_pb2.Usage(
                prompt_tokens=prompt_tokens, reused_tokens=reused_tokens, completion_tokens=generated
            ),
            receipt=conversations_pb2.TurnReceipt(
                strategy=self._strategy_name,
                new_prompt_tokens=ran,
                reused_tokens=reused_tokens,
                kv_bytes=sequence.kv_bytes,
                kv_bytes_full=sequence.kv_bytes_full,
                prefill_ms=(first_token - (reading.begun or first_token)) * 1000,
                first_token_ms=(first_token - self._accepted) * 1000,
                decode_ms=(ended - first_token) * 1000,
                total_ms=(ended - self._accepted) * 1000,
                restored=not resident,
                restored_from=conversations_pb2.TurnReceipt.RestoredFrom.Value(
                    "RESTORED_FROM_UNSPECIFIED" if resident else (reading.restored or Tier.LOG).name
                ),
            ),
        )

    def _as_answered(self, sequence: Sequence, answer_begins: int) -> AnsweredTurn:
        return AnsweredTurn(
            self._dialogue.tenant,
            self._strategy_name,
            self._dialogue.strategy,
            tuple(sequence.log),
            answer_begins,
            # Before the fewest tokens are said the most likely one may be one that it could not take.
            greedy=self._request.sampling.temperature == 0 and not self._request.min_new_tokens,
        )


def check_context(sequence: Sequence, items: list[Item], max_new_tokens: int, context: int) -> None:
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
