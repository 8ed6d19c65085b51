"""A session: a named conversation that does one thing at a time. Belongs to the event loop's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog

from vflow_client.v1 import conversations_pb2, images_pb2
from vflow_server.engine.engine import Engine, Steps, Ticket, Work, WorkCancelled
from vflow_server.engine.piece_thread import PieceThread
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.kv.session_state import SessionState
from vflow_server.rpc.errors import ServiceError, model_changed, session_busy, session_deleted, session_not_found
from vflow_server.sessions.live_samples import LiveSamples
from vflow_server.sessions.turn import TurnRequest, turn
from vflow_server.sessions.work import add_image, fork, shown
from vflow_server.store.answers import AnswerCache, StoredAnswer
from vflow_server.store.session_record import Recovered, SessionRecord
from vflow_server.strategies.strategies import StrategyRevision
from vflow_server.tuning.fidelity_monitor import FidelityMonitor
from vflowopt.media.video import Visual
from vflowopt.runtime.model_runner import Runtime

E = TypeVar("E")
R = TypeVar("R")

_PATIENCE = 0.25
"""Seconds to wait before SESSION_BUSY. A client may send its next turn right after it cancelled one or ran into the
deadline, and the server may see the new turn before the cancellation."""

log = structlog.get_logger(__name__)


class _Ticket(Protocol):
    """A ticket of any kind of work."""

    cancelled: bool

    def cancel(self) -> None: ...

    async def ended(self, patience: float | None = None) -> None: ...


@dataclass(frozen=True)
class _UnderWay:
    """The work that a session is doing, and the number of pictures that the session then has."""

    ticket: _Ticket
    request_id: str
    pictures: int


@dataclass(frozen=True)
class SessionParts:
    """The parts of a service that all its sessions share.

    Attributes:
        engine: runs their work.
        runtime: the model.
        kv: their KV caches.
        images: the cache of compressed pictures.
        tokenizer: tokenizes their texts.
        live_samples: collects pictures and questions.
        monitor: compares some turns with the unpruned model.
    """

    engine: Engine
    runtime: Runtime
    kv: KVCacheManager
    images: ImageCache
    tokenizer: PieceThread
    live_samples: LiveSamples
    monitor: FidelityMonitor


class Session:
    """One session.

    Args:
        name: its resource name.
        number: position in the order of creation of all sessions.
        tenant: the tenant that it belongs to.
        revision: its strategy, which never changes.
        parts: the parts that it shares with other sessions.
        record: its record in the data folder; None if it is not stored.

    Attributes:
        state: the engine's side of it.
        created: Unix time in seconds.
        used: Unix time in seconds of its last use.
        idle_from: Unix time in seconds since when it has been idle; see :attr:`idle` for the duration.
        deleted: whether it was deleted.
    """

    def __init__(
        self,
        name: str,
        number: int,
        tenant: str,
        revision: StrategyRevision,
        parts: SessionParts,
        record: SessionRecord | None = None,
    ) -> None:
        self.name = name
        self.number = number
        self.tenant = tenant
        self.revision = revision
        self.record = record
        self.state = SessionState(parts.runtime, revision.strategy, tenant, record, name=name)
        self.created = self.used = time.time() if record is None else record.facts.created
        self.deleted = False
        self._parts = parts
        # None: the answers of an earlier process are read with the first request.
        self._answers: AnswerCache | None = AnswerCache()
        self.idle_from = self.used
        self._idle_since = time.monotonic()  # sessions expire by a clock that is never set back
        self._under_way: _UnderWay | None = None
        self._calls = 0
        self._deletion: asyncio.Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether work of this session is running or waiting."""
        return self._under_way is not None

    @property
    def awaited(self) -> bool:
        """Whether a call is about to use it, such as one whose pictures are being decoded (:meth:`call`)."""
        return self._calls > 0

    @property
    def deleting(self) -> bool:
        """Whether its record is being deleted."""
        return self._deletion is not None

    @property
    def pictures(self) -> int:
        """Number of pictures and videos in its log, including those that its running work is about to add."""
        logged = self.state.snapshot.images
        return logged if self._under_way is None else max(logged, self._under_way.pictures)

    @property
    def idle(self) -> float:
        """Seconds since its last use, or since it was recovered."""
        return time.monotonic() - self._idle_since

    @property
    def goes_on(self) -> bool:
        """Whether it belongs to the model that is served now. A session of another model is only stored."""
        return self.record is None or self.record.facts.model == self._parts.runtime.revision

    def recover(self, found: Recovered) -> None:
        """Continue a session of an earlier process."""
        self.used, self.idle_from = found.used, time.time()
        self._answers = None
        self.state.resume(found.turns, found.images)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count a call that is about to use the session, within the block. Meanwhile the session does not expire.

        It is idle from the end of the block on, even if the call was refused or had its answer already.
        """
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._idle_from_now()

    async def show(
        self,
        visual: Visual,
        *,
        request_id: str = "",
        fingerprint: str = "",
        admit: Callable[[], None] = lambda: None,
    ) -> tuple[images_pb2.ImageReceipt, bool]:
        """Add ``visual`` before the next turn, or find that the same request has done so.

        Args:
            visual: the picture or video.
            request_id: identifies a request that the client may repeat; empty if it has none.
            fingerprint: digest of the request's content.
            admit: called right before ``visual`` is added; an exception that it raises refuses it.

        Returns:
            The receipt, and whether it is that of an earlier call.

        Raises:
            ServiceError: SESSION_BUSY, SESSION_NOT_FOUND, SESSION_DELETED, REQUEST_ID_REUSED, MODEL_CHANGED;
                SESSION_DAMAGED or STORAGE_FAILED if stored answers cannot be read; or an error of the engine or of
                :func:`~vflow_server.sessions.work.add_image`.
            PictureError: the model does not take it.
        """
        answers = await self._stored_answers()
        await self._until_free(request_id)
        if (stored := answers.find(request_id, fingerprint)) is not None:
            return stored.images[0], True
        admit()
        parts = self._parts

        def work(emit: Callable[[None], None]) -> Steps[images_pb2.ImageReceipt]:
            return add_image(
                parts.runtime,
                parts.kv,
                parts.images,
                parts.tokenizer,
                self.state,
                visual,
                session_name=self.name,
                strategy_name=self.revision.name,
                store_as=(request_id, fingerprint) if request_id else None,
            )

        ticket = self._begin(work, request_id, adds=1)
        if request_id:
            ticket.on_result(lambda receipt: answers.put(StoredAnswer(request_id, fingerprint, shown(receipt))))
        ticket.on_result(lambda _: self._showed(visual))
        try:
            return await self.outcome(ticket), False
        finally:
            ticket.cancel()

    async def answer(
        self,
        request: TurnRequest,
        *,
        accepted: float,
        request_id: str = "",
        fingerprint: str = "",
        admit: Callable[[int], None] = lambda pictures: None,
    ) -> Ticket[str, conversations_pb2.Finished] | conversations_pb2.Finished:
        """Start a turn, or return the stored answer to the same request.

        The caller must cancel the ticket when it no longer needs it, and get its result from :meth:`outcome`.

        Args:
            request: the turn.
            accepted: ``time.perf_counter()`` when the request arrived.
            request_id: identifies a request that the client may repeat; empty if it has none.
            fingerprint: digest of the request's content.
            admit: called with the number of its pictures right before a turn starts that has no stored answer; an
                exception that it raises refuses the turn.

        Returns:
            The ticket of the turn, whose events are pieces of text, or the stored answer.

        Raises:
            ServiceError: SESSION_BUSY, SESSION_NOT_FOUND, REQUEST_ID_REUSED, MODEL_CHANGED; SESSION_DAMAGED or
                STORAGE_FAILED if stored answers cannot be read; or an error of :meth:`Engine.submit`.
        """
        answers = await self._stored_answers()
        await self._until_free(request_id)
        if (stored := answers.find(request_id, fingerprint)) is not None:
            return stored
        pictures = sum(not isinstance(part, str) for part in request.parts)
        admit(pictures)
        parts = self._parts

        def work(emit: Callable[[str], None]) -> Steps[conversations_pb2.Finished]:
            return turn(
                parts.runtime,
                parts.kv,
                parts.images,
                parts.tokenizer,
                self.state,
                request,
                emit,
                session_name=self.name,
                strategy_name=self.revision.name,
                accepted=accepted,
                monitor=parts.monitor,
                store_as=(request_id, fingerprint) if request_id else None,
            )

        ticket = self._begin(work, request_id, adds=pictures)
        # Stored by the ticket, not by the caller's task: a caller that is gone by then will send the request again.
        if request_id:
            ticket.on_result(lambda finished: answers.put(StoredAnswer(request_id, fingerprint, finished)))
        ticket.on_result(lambda _: self._answered(request))
        return ticket

    async def fork(self, twin: Session, *, admit: Callable[[int], None] = lambda pictures: None) -> None:
        """Copy the state of this session to ``twin``, a new session. Both are busy until that is done.

        Args:
            twin: the new session, which no caller may know yet.
            admit: called with the number of pictures that the twin will have, right before the fork starts; an
                exception that it raises refuses it.

        Raises:
            ServiceError: SESSION_BUSY, SESSION_NOT_FOUND, SESSION_DELETED, MODEL_CHANGED, or an error of the engine or
                of :func:`~vflow_server.sessions.work.fork`.
        """
        await self._until_free()
        pictures = self.state.snapshot.images
        admit(pictures)
        parts = self._parts

        def work(emit: Callable[[None], None]) -> Steps[None]:
            return fork(parts.kv, parts.images, self.state, twin.state)

        ticket = twin._follow(self._begin(work), pictures=pictures)
        try:
            await self.outcome(ticket)
        finally:
            ticket.cancel()

    async def outcome(self, ticket: Ticket[E, R]) -> R:
        """Wait for the result of a ticket of this session.

        Raises:
            ServiceError: SESSION_DELETED if the work was cancelled by :meth:`release`.
            Exception: the exception that the work raised.
        """
        try:
            return await ticket.result()
        except WorkCancelled:  # a caller that cancelled its own work does not ask for the outcome
            raise session_deleted(self.name) from None

    @asynccontextmanager
    async def deletion(self) -> AsyncIterator[None]:
        """The session's deletion: within the block its record is deleted, and work that has not begun waits.

        If the block raises, the session goes on. After it the session is deleted, and its running work is cancelled.

        Raises:
            ServiceError: SESSION_NOT_FOUND if it was deleted before.
        """
        await self._until_not_deleting()
        self._deletion = deletion = asyncio.get_running_loop().create_future()
        try:
            yield
            self.deleted = self.state.forgotten = True
        finally:
            self._deletion = None
            deletion.set_result(None)

    async def release(self) -> None:
        """Cancel the running work of a deleted session, and release its memory; returns when that is done.

        If the engine takes no more calls, its end releases the memory.
        """
        await self.stop_working()
        try:
            await self._parts.engine.call(lambda: self._parts.kv.forget(self.state), self.tenant).result()
        except ServiceError as error:
            log.debug("the end of the engine releases a deleted session", session=self.name, reason=error.reason)

    async def stop_working(self) -> None:
        """Cancel the running work, and wait until it has undone what it did."""
        while self._under_way is not None:
            self._under_way.ticket.cancel()
            await self._under_way.ticket.ended()

    def _begin(self, work: Work[E, R], request_id: str = "", *, adds: int = 0) -> Ticket[E, R]:
        """Begin work that adds ``adds`` pictures. All work begins here."""
        # Looked at once more where nothing can come between the look and the beginning.
        if self.deleted or self.deleting:
            raise session_not_found(self.name)
        if self.busy:
            raise session_busy(self.name)
        if self.record is not None and not self.goes_on:
            raise model_changed(self.name, self.record.facts.model, self._parts.runtime.revision)
        pictures = self.state.snapshot.images + adds
        return self._follow(self._parts.engine.submit(work, self.tenant), request_id, pictures=pictures)

    def _follow(self, ticket: Ticket[E, R], request_id: str = "", *, pictures: int) -> Ticket[E, R]:
        self._under_way = _UnderWay(ticket, request_id, pictures)
        # The session is busy until the engine is done: a caller may be gone long before its work is undone.
        ticket.on_end(self._ended)
        return ticket

    def _showed(self, visual: Visual) -> None:
        self._parts.live_samples.note_image(self.tenant, self.name, visual, images=self.state.snapshot.images)

    def _answered(self, request: TurnRequest) -> None:
        snapshot = self.state.snapshot
        self._parts.live_samples.note_turn(
            self.tenant, self.name, request.parts, turns=snapshot.turns, images=snapshot.images
        )

    def _ended(self) -> None:
        self._under_way = None
        self._idle_from_now()
        self.used = self.idle_from

    def _idle_from_now(self) -> None:
        self.idle_from = time.time()
        self._idle_since = time.monotonic()

    async def _stored_answers(self) -> AnswerCache:
        if self._answers is None and self.record is not None:
            answers = await asyncio.wrap_future(self.record.answers())
            self._answers = self._answers or AnswerCache(answers)
        assert self._answers is not None, "a session without a record has no stored answers to read"
        return self._answers

    async def _until_free(self, request_id: str = "") -> None:
        """Wait for cancelled work and for an earlier call with the same request_id; refuse if other work is running."""
        await self._until_not_deleting()
        while (current := self._under_way) is not None:
            if current.ticket.cancelled or (request_id and current.request_id == request_id):
                await current.ticket.ended()
            else:
                await current.ticket.ended(_PATIENCE)
                if self._under_way is current and not current.ticket.cancelled:
                    raise session_busy(self.name)
            await self._until_not_deleting()

    async def _until_not_deleting(self) -> None:
        """Wait for a deletion that is under way, which may fail.

        Raises:
            ServiceError: SESSION_NOT_FOUND; the session was deleted.
        """
        while self._deletion is not None:
            await asyncio.wait([self._deletion])
        if self.deleted:
            raise session_not_found(self.name)
