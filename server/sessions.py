"""All sessions: created within a bound, found by name, deleted on request or when they stay idle.

Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

import structlog

from vflow_server.engine import Engine
from vflow_server.errors import CapacityExhausted, ServiceError, session_not_found
from vflow_server.live_samples import LiveSamples
from vflow_server.places import has_place
from vflow_server.session import Session
from vflow_server.strategies import StrategyRevision
from vflow_server.watch import Watch
from vflow_server.workbench import Workbench

log = structlog.get_logger(__name__)


class SessionStore:
    """The sessions that live.

    Args:
        engine: does their work.
        bench: what the work is done with.
        live_samples: hears what is shown and asked in them.
        watch: looks at their turns afterwards.
        most: how many may live at the same time; a tenant that has none may go beyond.
        idle_timeout: seconds without use after which a session is deleted.
    """

    def __init__(
        self,
        engine: Engine,
        bench: Workbench,
        live_samples: LiveSamples,
        watch: Watch,
        *,
        most: int,
        idle_timeout: float,
    ) -> None:
        self._engine = engine
        self._bench = bench
        self._live_samples = live_samples
        self._watch = watch
        self._most = most
        self.idle_timeout = idle_timeout
        self._sessions: dict[str, Session] = {}
        self._sequence = count()

    def create(self, tenant: str, revision: StrategyRevision) -> Session:
        """A new session of ``tenant`` under ``revision``.

        Raises:
            CapacityExhausted: too many sessions live.
        """
        living = Counter(session.tenant for session in self)
        if not has_place(living, tenant, self._most):
            raise CapacityExhausted(
                "sessions",
                f"{living.total()} sessions live already; delete some, or retry when idle ones have expired",
                metadata={"sessions": living.total()},
                retry_after=min(self.idle_timeout, 10.0),
            )
        name = f"sessions/s{secrets.token_hex(10)}"
        session = Session(
            name, next(self._sequence), tenant, revision, self._engine, self._bench, self._live_samples, self._watch
        )
        self._sessions[name] = session
        return session

    async def fork(self, origin: Session) -> Session:
        """A new session with the past of ``origin``.

        Raises:
            ServiceError: too many sessions live, or what :meth:`Session.fork` raises.
        """
        twin = self.create(origin.tenant, origin.revision)
        try:
            await origin.fork(twin)
        except BaseException:  # the caller never hears of the twin, even where the work was done just before it left
            del self._sessions[twin.name]
            with suppress(ServiceError):
                twin.delete()
            raise
        return twin

    def get(self, tenant: str, name: str) -> Session:
        """The session ``name`` of ``tenant``.

        Raises:
            NotFound: SESSION_NOT_FOUND, as well for a session of another tenant.
        """
        session = self._sessions.get(name)
        if session is None or session.tenant != tenant:
            raise session_not_found(name)
        return session

    def of(self, tenant: str) -> Iterator[Session]:
        """The sessions of ``tenant``, oldest first."""
        return (session for session in self if session.tenant == tenant)

    def __iter__(self) -> Iterator[Session]:
        """The sessions of all tenants, oldest first."""
        return iter(self._sessions.values())

    async def delete(self, session: Session) -> None:
        """Delete ``session``, cancelling what is under way in it; returns when its memory is free.

        Raises:
            NotFound: SESSION_NOT_FOUND, where it was deleted before.
        """
        if self._sessions.pop(session.name, None) is None:
            raise session_not_found(session.name)
        await session.delete().result()

    async def expire_forever(self) -> None:
        """Delete sessions as they expire."""
        while True:
            await asyncio.sleep(min(self.idle_timeout / 4, 10.0))
            latest = time.time() - self.idle_timeout
            for session in [session for session in self if not session.busy and session.used < latest]:
                log.info("session expired", session=session.name)
                try:
                    await self.delete(session)
                except ServiceError as error:  # deleted meanwhile, or the engine is going down
                    log.debug("an expired session was not deleted", session=session.name, reason=error.reason)
                except Exception:  # one that resists must not keep the others from expiring
                    log.exception("an expired session was not deleted", session=session.name)
