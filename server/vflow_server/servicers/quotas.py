"""Quotas: what one tenant may have and do at most, whatever room there is.

Sessions and pictures are counted as they stand; work is counted while it is under way, and its tokens by the minute.
Belongs to the event loop's thread.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from vflow_server.engine.engine import Engine
from vflow_server.kv.manager import KVCacheManager
from vflow_server.rpc.errors import CapacityExhausted
from vflow_server.sessions.sessions import SessionStore


@dataclass(frozen=True)
class Quota:
    """What each tenant may have and do; None: without limit.

    Attributes:
        sessions: that live.
        pictures: in these sessions, a fork's among them.
        kv_bytes: of KV cache that its sessions hold when more work begins; idle ones are offloaded before it is
            refused.
        turns: turns, and pictures to be shown or compressed, at the same time.
        tokens_per_minute: that are run or generated. Known when a turn has ended: what was too much is waited for
            before the next one.
    """

    sessions: int | None = None
    pictures: int | None = None
    kv_bytes: int | None = None
    turns: int | None = None
    tokens_per_minute: int | None = None


class Allowance:
    """Tokens that come back evenly, up to those of a minute.

    Args:
        per_minute: how many.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left = float(per_minute)
        self._at = time.monotonic()

    @property
    def left(self) -> float:
        """How many there are; below zero where too many were taken."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) * self.per_minute / 60, self.per_minute)
        self._at = now
        return self._left

    def spend(self, tokens: int) -> None:
        """Take some, more than there are if need be."""
        self._left = self.left - tokens

    def seconds_until_one(self) -> float:
        """After what time there is one."""
        return (1 - self.left) * 60 / self.per_minute


@dataclass(eq=False)
class Charge:
    """Charge of a tenant that is under way; whoever does it says what it comes to.

    Attributes:
        tokens: that were run or generated.
        pictures: that it shows to a session (:meth:`Quotas.show`).
    """

    tokens: int = 0
    pictures: int = 0


@dataclass
class _Use:
    """What a tenant is doing, and has lately done."""

    allowance: Allowance | None
    under_way: set[Charge] = field(default_factory=set)

    @property
    def over(self) -> bool:
        """Whether nothing of it matters any more."""
        return not self.under_way and (self.allowance is None or self.allowance.left >= self.allowance.per_minute)


class Quotas:
    """Holds every tenant to one quota.

    Args:
        quota: of each.
        sessions: that live.
        engine: in whose thread caches are offloaded.
        kv: offloads them.
    """

    def __init__(self, quota: Quota, sessions: SessionStore, engine: Engine, kv: KVCacheManager) -> None:
        self._quota = quota
        self._sessions = sessions
        self._engine = engine
        self._kv = kv
        self._uses: dict[str, _Use] = {}

    def check_session(self, tenant: str, pictures: int = 0) -> None:
        """Refuse ``tenant`` another session, with so many ``pictures`` in it from the beginning.

        Raises:
            CapacityExhausted: it has as many as it may.
        """
        most = self._quota.sessions
        if most is not None and sum(1 for _ in self._sessions.of(tenant)) >= most:
            raise _exceeded("tenant_sessions", most, f"has {most} sessions, as many as it may; delete some", None)
        self._check_pictures(tenant, pictures)

    @asynccontextmanager
    async def work(self, tenant: str) -> AsyncIterator[Charge]:
        """Count a turn, a picture to be shown or one to be compressed as under way.

        Raises:
            CapacityExhausted: the tenant does, or has used, as much as it may.
        """
        use = self._use(tenant)
        self._check_work(use)
        work = Charge()
        use.under_way.add(work)
        try:
            await self._make_room(tenant)
            yield work
        finally:
            use.under_way.remove(work)
            if use.allowance is not None:
                use.allowance.spend(work.tokens)

    def show(self, tenant: str, work: Charge, pictures: int) -> None:
        """Count so many ``pictures`` as about to be shown to a session by ``work``.

        Raises:
            CapacityExhausted: the tenant has as many as it may.
        """
        self._check_pictures(tenant, pictures)
        work.pictures += pictures

    def _use(self, tenant: str) -> _Use:
        if tenant not in self._uses:
            self._uses = {name: use for name, use in self._uses.items() if not use.over}
            minute = self._quota.tokens_per_minute
            self._uses[tenant] = _Use(None if minute is None else Allowance(minute))
        return self._uses[tenant]

    def _check_work(self, use: _Use) -> None:
        most = self._quota.turns
        if most is not None and len(use.under_way) >= most:
            raise _exceeded(
                "tenant_turns", most, f"has {most} turns or pictures under way, as many as it may; let one end", 1.0
            )
        if use.allowance is not None and use.allowance.left <= 0:
            minute = use.allowance.per_minute
            raise _exceeded(
                "tenant_tokens",
                minute,
                f"has used up the {minute} tokens that it may have run or generated a minute; wait",
                use.allowance.seconds_until_one(),
            )

    def _check_pictures(self, tenant: str, more: int) -> None:
        most = self._quota.pictures
        if most is None or not more:
            return
        shown = sum(session.state.snapshot.images for session in self._sessions.of(tenant))
        if shown + sum(work.pictures for work in self._use(tenant).under_way) + more > most:
            raise _exceeded(
                "tenant_pictures", most, f"has {shown} pictures in its sessions and may have {most}; delete some", None
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
