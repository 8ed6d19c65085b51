"""The token meter: takes what the model runs for a tenant from the tenant's allowance, at the moment it is run."""

from __future__ import annotations

import threading
import time

_FEW = 64
"""Tenants that are remembered without a look at whether they need to be."""


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


class TokenMeter:
    """The allowances of all tenants. Its methods may be called from any thread.

    Args:
        per_minute: number of tokens per minute of each tenant; None: no bound, and nothing is counted.
    """

    def __init__(self, per_minute: int | None = None) -> None:
        self.per_minute = per_minute
        self._lock = threading.Lock()
        self._allowances: dict[str, Allowance] = {}
        self._look_at = _FEW  # number of tenants at which those that are as good as new are forgotten

    def __len__(self) -> int:
        """Number of tenants that are remembered."""
        return len(self._allowances)

    def add(self, tenant: str, tokens: int) -> None:
        """Take ``tokens`` that were run for ``tenant`` from its allowance, whatever becomes of the work."""
        if self.per_minute is None or not tokens:
            return
        with self._lock:
            if tenant not in self._allowances:
                self._forget_full(self.per_minute)
                self._allowances[tenant] = Allowance(self.per_minute)
            self._allowances[tenant].spend(tokens)

    def _forget_full(self, per_minute: int) -> None:
        """Forget the tenants whose allowance is full, who are as good as new, once there are twice as many as then."""
        if len(self._allowances) < self._look_at:
            return
        self._allowances = {name: each for name, each in self._allowances.items() if each.left < per_minute}
        self._look_at = max(2 * len(self._allowances), _FEW)

    def seconds_until_one(self, tenant: str) -> float:
        """Seconds until ``tenant`` may run a token; 0 if it may run one now."""
        with self._lock:
            allowance = self._allowances.get(tenant)
            if allowance is None or allowance.left > 0:
                return 0.0
            return allowance.seconds_until_one()
