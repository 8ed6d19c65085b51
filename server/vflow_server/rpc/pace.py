"""A pace that something keeps, so that a flood of it leaves the event loop to others."""

from __future__ import annotations

import asyncio
import time


class Pace:
    """Holds callers back beyond a rate. Belongs to the event loop's thread.

    Args:
        rate: number that may go on in a second.
        burst: number that may go on ahead of the rate.
        most_held: number that are held back at most. Further ones go on at once, as to hold more would take memory.
    """

    def __init__(self, rate: float, burst: int, most_held: int) -> None:
        self._rate = rate
        self._burst = burst
        self._most_held = most_held
        self._next = time.monotonic()
        self._held = 0

    async def keep(self) -> None:
        """Wait until one more may go on."""
        if self._held >= self._most_held:
            return
        now = time.monotonic()
        self._next = max(self._next, now - self._burst / self._rate) + 1 / self._rate
        if self._next <= now:
            return
        self._held += 1
        try:
            await asyncio.sleep(self._next - now)
        finally:
            self._held -= 1
