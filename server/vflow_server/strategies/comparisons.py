"""Comparing strategies on samples, in spare time. Belongs to the event loop's thread, but for the work itself."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from vflow_server.engine.engine import Engine, Steps
from vflow_server.engine.spare_time import in_spare_time
from vflow_server.engine.workbench import Workbench
from vflow_server.rpc.errors import CapacityExhausted
from vflowopt.compression.strategy import Strategy
from vflowopt.search.calibration import Calibration, Comparison


class Comparisons:
    """Compares strategies, for one caller at a time.

    Args:
        engine: does the work.
        bench: what the work is done with.
    """

    def __init__(self, engine: Engine, bench: Workbench) -> None:
        self._engine = engine
        self._bench = bench
        self._under_way = False

    def check_free(self) -> None:
        """Refuse a comparison beside another one.

        Raises:
            CapacityExhausted: one is under way.
        """
        if self._under_way:
            raise CapacityExhausted(
                "comparisons",
                "another comparison of strategies is under way; retry once it has ended",
                retry_after=10.0,
            )

    async def compare(self, tenant: str, strategies: Sequence[Strategy], calibration: Calibration) -> list[Comparison]:
        """What each of ``strategies`` comes to on ``calibration``, in their order, for ``tenant``.

        Raises:
            ServiceError: one is under way, or what the work was refused for.
        """
        self.check_free()
        self._under_way = True
        try:
            ticket = self._engine.submit(_comparing(self._bench, strategies, calibration), tenant, background=True)
            try:
                return await ticket.result()
            finally:
                ticket.cancel()
        finally:
            self._under_way = False


def _comparing(
    bench: Workbench, strategies: Sequence[Strategy], calibration: Calibration
) -> Callable[[Callable[[object], None]], Steps[list[Comparison]]]:
    """The work of comparing."""

    def pieces() -> Generator[Any, None, None]:
        yield from calibration.prepare()
        for strategy in strategies:
            yield from calibration.compare(strategy)

    def work(emit: Callable[[object], None]) -> Steps[list[Comparison]]:
        compared: list[Comparison] = []
        yield from in_spare_time(bench, pieces(), lambda: calibration.sequences, compared.append)
        return compared

    return work
