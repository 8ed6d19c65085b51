"""All sessions: created up to a bound, found by name, deleted on request or after an idle time.

Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import structlog

from vflow_server.engine.fair_queue import below_share, may_admit
from vflow_server.rpc.errors import CapacityExhausted, ServiceError, session_not_found
from vflow_server.sessions.session import Session, SessionParts
from vflow_server.store.archive import Archive
from vflow_server.store.session_record import SessionFacts, SessionRecord, recover
from vflow_server.strategies.strategies import StrategyRevision
from vflow_server.watchdog.pulse import Pulse
from vflowopt.compression.strategy import Strategy, StrategyError

log = structlog.get_logger(__name__)


class SessionStore:
    """The sessions that exist, including those of an earlier process.

    Args:
        parts: the parts that all sessions share.
        most: how many sessions may exist at once; a tenant that has none, or few, may exceed it (see
            :func:`~vflow_server.engine.fair_queue.below_share`).
        idle_timeout: seconds without use after which a session is deleted (also an attribute).
        archive: holds their records; None: sessions end with the process.

    Attributes:
        expiry_pulse: the pulse of :meth:`expire_forever`.

    Raises:
        ServiceError: STORAGE_FAILED.
    """

    def __init__(
        self,
        parts: SessionParts,
        *,
        most: int,
        idle_timeout: float,
        archive: Archive | None = None,
    ) -> None:
        self._parts = parts
        self._most = most
        self.idle_timeout = idle_timeout
        self.expiry_pulse = Pulse()
        self._archive = archive
        self._sessions: dict[str, Session] = {}
        self._incomplete: set[Session] = set()
        # Records of sessions that came to nothing, which the disk did not let go.
        self._leftovers: set[SessionRecord] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = count(self._recover(archive) if archive is not None else 0)
        by_use = sorted(self, key=lambda session: session.used)
        parts.kv.recover([session.state for session in by_use if session.goes_on])

    async def create(self, tenant: str, revision: StrategyRevision) -> Session:
        """Create a session of ``tenant`` with the strategy ``revision``.

        Raises:
            ServiceError: CAPACITY_EXHAUSTED if there are too many sessions or the data folder is full; STORAGE_FAILED.
        """
        async with self._coming(tenant, revision) as session:
            if session.record is not None:
                await asyncio.wrap_future(session.record.begin())
        return session

    @asynccontextmanager
    async def _coming(self, tenant: str, revision: StrategyRevision) -> AsyncIterator[Session]:
        """A new session, which is completed within the block.

        Nobody sees it before. If the block raises, nothing is left of it.
        """
        session = self._make(tenant, revision)
        self._incomplete.add(session)
        try:
            yield session
        except BaseException:  # the caller does not get its name, even if all was done
            await self._to_the_end(self._forget(session))
            raise
        self._incomplete.remove(session)
        self._sessions[session.name] = session

    def _make(self, tenant: str, revision: StrategyRevision) -> Session:
        """A new session, whose record is not written yet."""
        # Sessions of another model are only stored, and use no memory.
        living = Counter(session.tenant for session in self._all() if session.goes_on)
        if not (may_admit(living, tenant, self._most) or below_share(living, tenant, self._most)):
            raise CapacityExhausted(
                "sessions",
                f"the server holds {self._most} sessions at most; delete some, or retry when idle ones have expired",
                metadata={"max_sessions": self._most},
                retry_after=min(self.idle_timeout, 10.0),
            )
        name, number = f"sessions/s{secrets.token_hex(10)}", next(self._numbers)
        record = None
        if self._archive is not None:
            facts = SessionFacts(
                name,
                number,
                tenant,
                revision.name,
                revision.strategy.to_json(),
                self._parts.runtime.revision,
                time.time(),
            )
            record = SessionRecord(facts, self._archive)
        return Session(name, number, tenant, revision, self._parts, record)

    def _recover(self, archive: Archive) -> int:
        """Take over the sessions of ``archive``; returns the number of the next new session."""
        following = 0
        runtime = self._parts.runtime
        for found in recover(archive, runtime.revision, runtime.earlier_revisions):
            facts = found.record.facts
            following = facts.number + 1
            try:
                strategy = Strategy.from_json(facts.strategy)
            except StrategyError as error:
                log.error("a stored session cannot be read and is left out", session=facts.name, because=str(error))
                continue
            revision = StrategyRevision(facts.strategy_name, 0, strategy, "", facts.created)
            session = Session(facts.name, facts.number, facts.tenant, revision, self._parts, found.record)
            session.recover(found)
            self._sessions[session.name] = session
        strays = sum(not session.goes_on for session in self)
        log.info("sessions recovered", sessions=len(self._sessions), of_another_model=strays)
        return following

    async def fork(self, origin: Session, *, admit: Callable[[int], None] = lambda pictures: None) -> Session:
        """Create a session with a copy of the state of ``origin``.

        Args:
            origin: the session to copy.
            admit: see :meth:`Session.fork`.

        Raises:
            ServiceError: CAPACITY_EXHAUSTED if there are too many sessions, or an error of :meth:`Session.fork`.
        """
        async with self._coming(origin.tenant, origin.revision) as twin:
            await origin.fork(twin, admit=admit)
        return twin

    def get(self, tenant: str, name: str) -> Session:
        """The session ``name`` of ``tenant``.

        Raises:
            NotFound: SESSION_NOT_FOUND, also for a session of another tenant.
        """
        session = self._sessions.get(name)
        if session is None or session.tenant != tenant:
            raise session_not_found(name)
        return session

    def of(self, tenant: str) -> Iterator[Session]:
        """The sessions of ``tenant``, oldest first."""
        return iter(sorted((each for each in self if each.tenant == tenant), key=lambda session: session.number))

    def count(self, tenant: str) -> int:
        """Number of sessions of ``tenant``, including those that are being created."""
        return sum(session.tenant == tenant for session in self._all())

    def pictures(self, tenant: str) -> int:
        """Number of pictures in these sessions, including those that running work is about to add."""
        return sum(session.pictures for session in self._all() if session.tenant == tenant)

    def _all(self) -> Iterator[Session]:
        return iter((*self, *self._incomplete))

    def __iter__(self) -> Iterator[Session]:
        """The sessions of all tenants, in the order in which they were completed."""
        return iter(self._sessions.values())

    async def delete(self, session: Session) -> None:
        """Delete ``session`` and cancel its work; returns when its record and its memory are released.

        Raises:
            ServiceError: SESSION_NOT_FOUND if it was deleted before; STORAGE_FAILED, then it still exists.
        """
        await self._to_the_end(self._delete(session))  # a cancelled caller must not leave a session without its record

    async def _delete(self, session: Session) -> None:
        async with session.deletion():
            if session.record is not None:
                await asyncio.wrap_future(session.record.delete())
            self._sessions.pop(session.name)
        await session.release()

    async def _forget(self, session: Session) -> None:
        """Delete a session whose name no caller knows."""
        try:
            await session.stop_working()  # or it might write the record after this has deleted it
            async with session.deletion():
                if session.record is not None and session.record.stored:
                    await self._erase(session.record)
            await session.release()
        finally:
            self._incomplete.discard(session)

    async def _erase(self, record: SessionRecord) -> None:
        """Delete the record of a session that nobody knows. If that fails it is tried again when sessions expire."""
        self._leftovers.add(record)
        try:
            await asyncio.wrap_future(record.delete())
            self._leftovers.discard(record)
        except ServiceError as error:
            log.debug("a record that nobody needs was not deleted yet", session=record.facts.name, reason=error.reason)
        except Exception:  # sessions must expire all the same
            log.exception("a record that nobody needs was not deleted yet", session=record.facts.name)

    async def _to_the_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for ``work``, which continues if the caller is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop itself does not keep a task alive
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def finish(self) -> None:
        """Finish the deletions that were begun. No calls may be left, and the engine must have stopped.

        After the archive is closed nothing is deleted any more, and the next process would find those sessions.
        """
        while self._tasks:
            await asyncio.wait(self._tasks)
        for record in list(self._leftovers):
            await self._erase(record)

    async def expire_forever(self) -> None:
        """Delete sessions as they expire; never returns."""
        while True:
            self.expiry_pulse.rest()
            await asyncio.sleep(min(self.idle_timeout / 4, 10.0))
            self.expiry_pulse.beat()
            await self.expire()

    async def expire(self) -> None:
        """Delete the sessions that have expired."""
        for session in [each for each in self if self._expired(each)]:
            self.expiry_pulse.beat()
            await self._to_the_end(self._expire(session))
        for record in list(self._leftovers):
            await self._to_the_end(self._erase(record))

    def _expired(self, session: Session) -> bool:
        unused = not (session.busy or session.awaited or session.deleting)
        return unused and session.goes_on and session.idle > self.idle_timeout

    async def _expire(self, session: Session) -> None:
        # Looked at once more: it may have been used while the sessions before it were being deleted.
        if not self._expired(session):
            return
        log.info("session expired", session=session.name)
        try:
            await self._delete(session)
        except ServiceError as error:  # the data folder takes nothing
            log.debug("an expired session was not deleted", session=session.name, reason=error.reason)
        except Exception:  # the other sessions must expire all the same
            log.exception("an expired session was not deleted", session=session.name)
