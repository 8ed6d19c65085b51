"""Quotas: bounds on what one tenant may have and do, however much capacity is free.

Sessions and pictures are counted as they exist or are being made, work while it is running, and its tokens per minute.
Belongs to the event loop's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vflow_server.engine.engine import Engine
from vflow_server.engine.token_meter import TokenMeter
from vflow_server.kv.manager import KVCacheManager
from vflow_server.rpc.errors import CapacityExhausted
from vflow_server.sessions.sessions import SessionStore


@dataclass(frozen=True)
class Quota:
    """The bounds of each tenant; None: no bound.

    Attributes:
        sessions: number of sessions.
        pictures: number of pictures in these sessions; those of a fork count again.
        kv_bytes: bytes of KV cache that its sessions may hold when new work starts. Idle sessions are offloaded before
            work is refused.
        turns: number of turns, pictures that are added, and pictures that are compressed, at the same time.
        tokens_per_minute: tokens that the model encodes or runs per minute, counted then, whatever becomes of the work.
            Work that has begun may exceed the bound; the tenant must then wait before it begins more.
    """

    sessions: int | None = None
    pictures: int | None = None
    kv_bytes: int | None = None
    turns: int | None = None
    tokens_per_minute: int | None = None


class Quotas:
    """Enforces one quota for every tenant.

    Args:
        quota: the quota of each tenant.
        sessions: the sessions that exist.
        engine: calls ``kv`` in its thread.
        kv: offloads the caches of idle sessions.
        meter: takes the tokens that are run from the tenants' allowances.
    """

    def __init__(
        self, quota: Quota, sessions: SessionStore, engine: Engine, kv: KVCacheManager, meter: TokenMeter
    ) -> None:
        self._quota = quota
        self._sessions = sessions
        self._engine = engine
        self._kv = kv
        self._meter = meter
        self._under_way: Counter[str] = Counter()

    def check_session(self, tenant: str) -> None:
        """Check that ``tenant`` may have another session. It must be begun before anything else is awaited.

        Raises:
            CapacityExhausted: the quota of sessions is exhausted.
        """
        most = self._quota.sessions
        if most is not None and self._sessions.count(tenant) >= most:
            raise _exceeded("tenant_sessions", most, f"has {most} sessions, as many as it may; delete some", None)

    @asynccontextmanager
    async def work(self, tenant: str) -> AsyncIterator[None]:
        """Count a turn, a picture that is added or one that is compressed as running within the block.

        It is entered before the request is received.

        Raises:
            CapacityExhausted: a quota is exhausted.
        """
        self._check_work(tenant)
        self._under_way[tenant] += 1
        try:
            await self._make_room(tenant)
            yield
        finally:
            self._under_way[tenant] -= 1
            if not self._under_way[tenant]:
                del self._under_way[tenant]

    def under_way(self, tenant: str) -> int:
        """Number of turns and pictures of ``tenant`` that are running."""
        return self._under_way[tenant]

    def check_pictures(self, tenant: str, more: int) -> None:
        """Check that ``tenant`` may have ``more`` pictures. They must be begun before anything else is awaited.

        Raises:
            CapacityExhausted: the quota of pictures is exhausted.
        """
        most = self._quota.pictures
        if most is None or not more:
            return
        if (there := self._sessions.pictures(tenant)) + more > most:
            raise _exceeded(
                "tenant_pictures", most, f"has {there} pictures in its sessions and may have {most}; delete some", None
            )

    def _check_work(self, tenant: str) -> None:
        most = self._quota.turns
        if most is not None and self._under_way[tenant] >= most:
            raise _exceeded(
                "tenant_turns", most, f"has {most} turns or pictures under way, as many as it may; let one end", 1.0
            )
        minute = self._quota.tokens_per_minute
        if minute is not None and (wait := self._meter.seconds_until_one(tenant)) > 0:
            raise _exceeded(
                "tenant_tokens", minute, f"has used up the {minute} tokens that it may have run a minute; wait", wait
            )

    async def _make_room(self, tenant: str) -> None:
        most = self._quota.kv_bytes
        if most is None:
            return
        held = await self._engine.call(lambda: self._kv.limit(tenant, most), tenant).result()
        if held > most:
            raise _exceeded(
                "tenant_kv",
                most,
                f"has turns under way that hold {held} bytes of KV cache and may hold {most}; let one end",
                1.0,
            )


def _exceeded(resource: str, quota: int, has: str, retry_after: float | None) -> CapacityExhausted:
    return CapacityExhausted(resource, f"the tenant {has}", metadata={"quota": quota}, retry_after=retry_after)
