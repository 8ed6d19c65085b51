"""Comparisons of strategies on samples, in idle time. Belongs to the event loop's thread, except for the work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.engine import Engine, Steps
from vflow_server.engine.idle_work import idle_work
from vflow_server.kv.manager import KVCacheManager
from vflow_server.rpc.errors import CapacityExhausted
from vflowopt.compression.strategy import Strategy
from vflowopt.search.calibration import Calibration, Comparison
from vflowopt.search.pause import Pause


class Comparisons:
    """Compares strategies, for one caller at a time.

    Args:
        engine: runs the comparisons.
        kv: frees KV pages for them.
        encoder: encodes the samples' pictures.
    """

    def __init__(self, engine: Engine, kv: KVCacheManager, encoder: EncoderThread) -> None:
        self._engine = engine
        self._kv = kv
        self._encoder = encoder
        self._under_way = False

    def check_free(self) -> None:
        """Check that no comparison is running.

        Raises:
            CapacityExhausted: one is running.
        """
        if self._under_way:
            raise CapacityExhausted(
                "comparisons",
                "another comparison of strategies is under way; retry once it has ended",
                retry_after=10.0,
            )

    async def compare(self, tenant: str, strategies: Sequence[Strategy], calibration: Calibration) -> list[Comparison]:
        """Compare ``strategies`` with the unpruned model on the samples of ``calibration``.

        Args:
            tenant: the tenant that the work belongs to.
            strategies: the strategies.
            calibration: measures them.

        Returns:
            The comparison of each strategy, in the order of ``strategies``.

        Raises:
            ServiceError: a comparison is running, the engine has stopped, or the pool is too small for a sample.
            PictureError, CalibrationError: the model does not take a sample.
        """
        self.check_free()
        self._under_way = True
        try:
            ticket = self._engine.submit(
                _comparing(self._kv, self._encoder, strategies, calibration), tenant, background=True
            )
            try:
                return await ticket.result()
            finally:
                ticket.cancel()
        finally:
            self._under_way = False


def _comparing(
    kv: KVCacheManager, encoder: EncoderThread, strategies: Sequence[Strategy], calibration: Calibration
) -> Callable[[Callable[[object], None]], Steps[list[Comparison]]]:
    """The work of a comparison."""

    def pieces() -> Generator[Comparison | Pause, None, None]:
        yield from calibration.prepare()
        for strategy in strategies:
            yield from calibration.compare(strategy)

    def work(emit: Callable[[object], None]) -> Steps[list[Comparison]]:
        compared: list[Comparison] = []
        yield from idle_work(kv, encoder, pieces(), lambda: calibration.sequences, compared.append)
        return compared

    return work
