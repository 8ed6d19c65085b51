"""Quotas: bounds on what one tenant may have and do, however much capacity is free.

Sessions and pictures are counted as they exist, work while it is running, and its tokens per minute.
Belongs to the event loop's thread.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

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
        tokens_per_minute: tokens that are run or generated per minute, counted as they are run, whatever becomes of the
            turn or picture that they were run for. A tenant that exceeded the bound must wait before it begins further
            work.
    """

    sessions: int | None = None
    pictures: int | None = None
    kv_bytes: int | None = None
    turns: int | None = None
    tokens_per_minute: int | None = None


class Allowance:
    """A token bucket that refills evenly and holds the tokens of one minute.

    Args:
        per_minute: number of tokens per minute.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left = float(per_minute)
        self._at = time.monotonic()

    @property
    def left(self) -> float:
        """Number of tokens in the bucket; negative if too many were taken."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) * self.per_minute / 60, self.per_minute)
        self._at = now
        return self._left

    def spend(self, tokens: int) -> None:
        """Take ``tokens``, even if fewer are left."""
        self._left = self.left - tokens

    def seconds_until_one(self) -> float:
        """Seconds until one token is left; negative if there is one already."""
        return (1 - self.left) * 60 / self.per_minute


@dataclass(eq=False)
class Charge:
    """What one piece of running work adds.

    Attributes:
        pictures: pictures that it adds to a session (:meth:`Quotas.show`).
    """

    pictures: int = 0


_current: ContextVar[Charge] = ContextVar("charge")  # each call runs in its own task, and so in its own context


def current_charge() -> Charge:
    """The charge of the work that is running in this context.

    Raises:
        LookupError: no work is running.
    """
    return _current.get()


@dataclass
class _Use:
    """The running work of a tenant, its forks that are being made, its allowance, and the tokens taken from that."""

    allowance: Allowance | None
    under_way: set[Charge] = field(default_factory=set)
    copies: set[Charge] = field(default_factory=set)
    spent: int = 0

    @property
    def over(self) -> bool:
        """Whether it need not be remembered: nothing is running and the allowance is full."""
        return not (self.under_way or self.copies) and (
            self.allowance is None or self.allowance.left >= self.allowance.per_minute
        )


class Quotas:
    """Enforces one quota for every tenant.

    Args:
        quota: the quota of each tenant.
        sessions: the sessions that exist.
        engine: calls ``kv`` in its thread.
        kv: offloads the caches of idle sessions.
        meter: counts the tokens of the tenants.
    """

    def __init__(
        self, quota: Quota, sessions: SessionStore, engine: Engine, kv: KVCacheManager, meter: TokenMeter
    ) -> None:
        self._quota = quota
        self._sessions = sessions
        self._engine = engine
        self._kv = kv
        self._meter = meter
        self._uses: dict[str, _Use] = {}

    def check_session(self, tenant: str) -> None:
        """Check that ``tenant`` may have another session. It must be begun before anything else is awaited.

        Raises:
            CapacityExhausted: the quota of sessions is exhausted.
        """
        most = self._quota.sessions
        if most is not None and self._sessions.count(tenant) >= most:
            raise _exceeded("tenant_sessions", most, f"has {most} sessions, as many as it may; delete some", None)

    @contextmanager
    def copying(self, tenant: str) -> Iterator[Charge]:
        """Count the pictures of a session that is being forked within the block, by :meth:`show`."""
        use, charge = self._use(tenant), Charge()
        use.copies.add(charge)
        try:
            yield charge
        finally:
            use.copies.remove(charge)

    @asynccontextmanager
    async def work(self, tenant: str) -> AsyncIterator[Charge]:
        """Count a turn, a picture that is added or one that is compressed as running within the block.

        It is entered before the request is received. The servicer finds the charge by :func:`current_charge`.

        Raises:
            CapacityExhausted: a quota is exhausted.
        """
        use = self._use(tenant)
        self._check_work(use)
        charge = Charge()
        use.under_way.add(charge)
        _current.set(charge)
        try:
            await self._make_room(tenant)
            yield charge
        finally:
            use.under_way.remove(charge)

    def show(self, tenant: str, work: Charge, pictures: int) -> None:
        """Count ``pictures`` pictures that ``work`` is about to add to a session.

        Raises:
            CapacityExhausted: the quota of pictures is exhausted.
        """
        self._check_pictures(tenant, pictures)
        work.pictures += pictures

    def _use(self, tenant: str) -> _Use:
        if tenant not in self._uses:
            self._forget_idle()
            minute = self._quota.tokens_per_minute
            self._uses[tenant] = _Use(None if minute is None else Allowance(minute))
            if minute is not None:
                self._meter.watch(tenant)
        use = self._uses[tenant]
        self._spend(tenant, use)
        return use

    def _forget_idle(self) -> None:
        for tenant, use in list(self._uses.items()):
            self._spend(tenant, use)
            if use.over:
                del self._uses[tenant]
                self._meter.forget(tenant)

    def _spend(self, tenant: str, use: _Use) -> None:
        """Take the tokens that were run since the last call from the allowance."""
        total = self._meter.total(tenant)
        if use.allowance is not None and total > use.spent:
            use.allowance.spend(total - use.spent)
            use.spent = total

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
        use = self._use(tenant)
        if shown + sum(charge.pictures for charge in (*use.under_way, *use.copies)) + more > most:
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
