"""A session: a named dialogue that does one thing at a time. Belongs to the event loop's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from vflow_client.v1 import conversations_pb2, images_pb2
from vflow_server.engine.engine import Engine, Steps, Ticket, Work, WorkCancelled
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.kv.session_state import SessionState
from vflow_server.rpc.errors import model_changed, session_busy, session_deleted, session_not_found
from vflow_server.sessions.live_samples import LiveSamples
from vflow_server.sessions.turn import TurnRequest, turn
from vflow_server.sessions.work import add_image, fork
from vflow_server.store.answers import AnswerCache, StoredAnswer
from vflow_server.store.session_record import Recovered, SessionRecord
from vflow_server.strategies.strategies import StrategyRevision
from vflow_server.tuning.fidelity_monitor import FidelityMonitor
from vflowopt.media.video import Visual
from vflowopt.runtime.model_runner import Runtime

E = TypeVar("E")
R = TypeVar("R")

_PATIENCE = 0.25
"""Seconds before SESSION_BUSY. A client that cancels a turn, or runs out of time, and at once sends the next one is
right to do so, but here the next one may be seen first."""


class _Ticket(Protocol):
    """A ticket of whatever work."""

    cancelled: bool

    def cancel(self) -> None: ...

    async def ended(self, patience: float | None = None) -> None: ...


@dataclass(frozen=True)
class _UnderWay:
    """What a session is doing."""

    ticket: _Ticket
    request_id: str = ""


@dataclass(frozen=True)
class SessionParts:
    """What all sessions of a service share.

    Attributes:
        engine: does their work.
        runtime: the model.
        kv: their KV caches.
        images: compressed pictures.
        live_samples: notes what is shown and asked.
        monitor: looks at some turns afterwards.
    """

    engine: Engine
    runtime: Runtime
    kv: KVCacheManager
    images: ImageCache
    live_samples: LiveSamples
    monitor: FidelityMonitor


class Session:
    """One session.

    Args:
        name: its resource name.
        number: sessions count up in the order of their creation.
        tenant: whose it is.
        revision: the strategy that it keeps for as long as it lives.
        parts: what it shares with others.
        record: what the data folder holds of it; None: nothing.
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
        self.state = SessionState(parts.runtime, revision.strategy, tenant, record)
        self.created = self.used = time.time() if record is None else record.facts.created
        self.deleted = False
        self._parts = parts
        # Those of an earlier process are read when the first request comes.
        self._answers: AnswerCache | None = AnswerCache()
        self.idle_from = self.used
        """Unix time in seconds since when it has been idle, for people; see :attr:`idle`."""
        self._idle_since = time.monotonic()  # sessions expire by a clock that nobody sets
        self._under_way: _UnderWay | None = None

    @property
    def busy(self) -> bool:
        """Whether a turn or a picture is being worked on."""
        return self._under_way is not None

    @property
    def idle(self) -> float:
        """Seconds since its last use, or since it was recovered."""
        return time.monotonic() - self._idle_since

    @property
    def goes_on(self) -> bool:
        """Whether it was held with the model that is served now; if not, it is only kept."""
        return self.record is None or self.record.facts.model == self._parts.runtime.revision

    def recover(self, found: Recovered) -> None:
        """Go on where an earlier process ended."""
        self.used, self.idle_from = found.used, time.time()
        self._answers = None
        self.state.resume(found.turns, found.images)

    async def show(self, visual: Visual) -> images_pb2.ImageReceipt:
        """Show ``visual`` ahead of the next turn.

        Raises:
            ServiceError: SESSION_BUSY, SESSION_NOT_FOUND, SESSION_DELETED, MODEL_CHANGED, or what the work was refused
                for.
        """
        await self._until_free()
        parts = self._parts

        def work(emit: Callable[[None], None]) -> Steps[images_pb2.ImageReceipt]:
            return add_image(
                parts.runtime,
                parts.kv,
                parts.images,
                self.state,
                visual,
                session_name=self.name,
                strategy_name=self.revision.name,
            )

        ticket = self._begin(work)
        ticket.on_result(lambda _: self._showed(visual))
        try:
            return await self.outcome(ticket)
        finally:
            ticket.cancel()

    async def answer(
        self,
        request: TurnRequest,
        *,
        accepted: float,
        request_id: str = "",
        fingerprint: str = "",
        admit: Callable[[], None] = lambda: None,
    ) -> Ticket[str, conversations_pb2.Finished] | conversations_pb2.Finished:
        """Begin a turn, or find the answer to the same request from before.

        The caller must cancel the ticket when it loses interest in it, and take its result by :meth:`outcome`.

        Args:
            request: the turn.
            accepted: ``time.perf_counter()`` when the request came.
            request_id: makes a repeated request safe.
            fingerprint: digest of the request's content.
            admit: called before a turn begins that was not answered yet; what it raises refuses the turn.

        Raises:
            ServiceError: SESSION_BUSY, SESSION_NOT_FOUND, REQUEST_ID_REUSED, MODEL_CHANGED, or what the work was
                refused for.
        """
        answers = await self._stored_answers()
        await self._until_free(request_id)
        if (stored := answers.find(request_id, fingerprint)) is not None:
            return stored
        admit()
        parts = self._parts

        def work(emit: Callable[[str], None]) -> Steps[conversations_pb2.Finished]:
            return turn(
                parts.runtime,
                parts.kv,
                parts.images,
                self.state,
                request,
                emit,
                session_name=self.name,
                strategy_name=self.revision.name,
                accepted=accepted,
                monitor=parts.monitor,
                store_as=(request_id, fingerprint) if request_id else None,
            )

        ticket = self._begin(work, request_id)
        # Not the caller's task: a caller that is gone when the turn is done will ask for it again.
        if request_id:
            ticket.on_result(lambda finished: answers.put(StoredAnswer(request_id, fingerprint, finished)))
        ticket.on_result(lambda _: self._answered(request))
        return ticket

    async def fork(self, twin: Session) -> None:
        """Give ``twin``, a new session, the past of this one; until that is done it is busy, too.

        Raises:
            ServiceError: SESSION_BUSY, SESSION_NOT_FOUND, SESSION_DELETED, MODEL_CHANGED, or what the work was refused
                for.
        """
        await self._until_free()
        parts = self._parts

        def work(emit: Callable[[None], None]) -> Steps[None]:
            return fork(parts.kv, parts.images, self.state, twin.state)

        ticket = twin._follow(self._begin(work))
        try:
            await self.outcome(ticket)
        finally:
            ticket.cancel()

    async def outcome(self, ticket: Ticket[E, R]) -> R:
        """The result of a ticket of this session.

        Raises:
            ServiceError: SESSION_DELETED, or what the work was refused for.
        """
        try:
            return await ticket.result()
        except WorkCancelled:  # a caller that cancelled its own work does not ask for the outcome
            raise session_deleted(self.name) from None

    def delete(self) -> Ticket[None, None]:
        """Cancel what is under way and give back all memory; the ticket ends when that is done."""
        self.deleted = True
        if self._under_way is not None:
            self._under_way.ticket.cancel()
        return self._parts.engine.call(lambda: self._parts.kv.forget(self.state), self.tenant)

    def _begin(self, work: Work[E, R], request_id: str = "") -> Ticket[E, R]:
        if self.record is not None and not self.goes_on:
            raise model_changed(self.name, self.record.facts.model, self._parts.runtime.revision)
        return self._follow(self._parts.engine.submit(work, self.tenant), request_id)

    def _follow(self, ticket: Ticket[E, R], request_id: str = "") -> Ticket[E, R]:
        self._under_way = _UnderWay(ticket, request_id)
        # The engine's word, not the caller's: a caller may be gone long before its work is undone.
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
        self.used = self.idle_from = time.time()
        self._idle_since = time.monotonic()

    async def _stored_answers(self) -> AnswerCache:
        if self._answers is None and self.record is not None:
            answers = await asyncio.wrap_future(self.record.answers())
            self._answers = self._answers or AnswerCache(answers)
        assert self._answers is not None, "only a session with a record has answers to read"
        return self._answers

    async def _until_free(self, request_id: str = "") -> None:
        """Wait for what is being undone, and for an earlier call of the very same turn; refuse beside anything else."""
        while (current := self._under_way) is not None:
            if current.ticket.cancelled or (request_id and current.request_id == request_id):
                await current.ticket.ended()
                continue
            await current.ticket.ended(_PATIENCE)
            if self._under_way is current and not current.ticket.cancelled:
                raise session_busy(self.name)
        if self.deleted:
            raise session_not_found(self.name)
