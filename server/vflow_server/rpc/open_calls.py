"""Open calls, counted for each caller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vflow_server.rpc.errors import ServiceError


class OpenCalls:
    """Bounds the calls that are open at the same time. Belongs to the event loop's thread.

    Args:
        each: calls of one caller at most.
        in_all: calls of all callers at most.
        refusal: makes the error of a call beyond that; it is told whether the caller's own calls are too many.
    """

    def __init__(self, each: int, in_all: int, refusal: Callable[[bool], ServiceError]) -> None:
        self._each = each
        self._in_all = in_all
        self._refusal = refusal
        self._open: Counter[str] = Counter()
        self._total = 0

    @property
    def total(self) -> int:
        """Number of open calls."""
        return self._total

    @contextmanager
    def count(self, caller: str) -> Iterator[None]:
        """Count a call of ``caller`` as open within the block.

        Raises:
            ServiceError: too many calls are open.
        """
        own = self._open[caller]
        if own >= self._each or self._total >= self._in_all:
            if not own:
                del self._open[caller]
            raise self._refusal(own >= self._each)
        self._open[caller] += 1
        self._total += 1
        try:
            yield
        finally:
            self._total -= 1
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]
