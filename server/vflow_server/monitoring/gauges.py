"""Gauges: what is the case in the service at the moment when somebody asks, and what its parts have summed up.

Belongs to the event loop's thread; what it reads of the engine's things are single numbers that are always valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from vflow_server.engine.engine import Engine
from vflow_server.images.store import PictureStore
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.sessions.sessions import SessionStore
from vflow_server.strategies.strategies import StrategyStore
from vflow_server.tuning.fidelity_monitor import FidelityMonitor
from vflow_server.tuning.retune import Retunes
from vflowopt.runtime.model_runner import Runtime


class Gauges(Collector):
    """Reads off the parts of one service.

    Args:
        engine: what runs and waits.
        runtime: the model and its KV pool.
        kv: caches outside the pool.
        images: compressed pictures.
        sessions: that live.
        strategies: which one is active.
        pictures: that are held.
        fidelity_monitor: what it has seen.
        retunes: the one that is under way.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        runtime: Runtime,
        kv: KVCacheManager,
        images: ImageCache,
        sessions: SessionStore,
        strategies: StrategyStore,
        pictures: PictureStore,
        fidelity_monitor: FidelityMonitor,
        retunes: Retunes,
    ) -> None:
        self._engine = engine
        self._runtime = runtime
        self._kv = kv
        self._images = images
        self._sessions = sessions
        self._strategies = strategies
        self._pictures = pictures
        self._fidelity_monitor = fidelity_monitor
        self._retunes = retunes

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        yield from self._of_service()
        yield from self._of_memory()
        yield from self._of_sessions()
        yield from self._of_watch()
        yield from self._of_retune()

    def _of_service(self) -> Iterator[Metric]:
        runtime = self._runtime
        yield InfoMetricFamily(
            "vflow_build",
            "What is served by what.",
            {
                "version": version("vflowopt"),
                "model_revision": runtime.revision,
                "device": str(runtime.model.device),
                "dtype": str(runtime.model.dtype).removeprefix("torch."),
            },
        )
        yield InfoMetricFamily(
            "vflow_active_strategy", "The default of new sessions.", {"strategy": self._strategies.active.name}
        )
        yield GaugeMetricFamily("vflow_engine_up", "1 as long as the engine takes work.", self._engine.alive)
        yield GaugeMetricFamily("vflow_queue_depth", "Requests that wait for their first step.", self._engine.waiting)
        yield GaugeMetricFamily("vflow_running", "Requests that share the model's steps.", self._engine.running)

    def _of_memory(self) -> Iterator[Metric]:
        pool = self._runtime.pool
        pages = GaugeMetricFamily("vflow_pool_pages", "Pages of the KV pool, by state.", labels=("state",))
        free = pool.free_pages
        pages.add_metric(("free",), free)
        pages.add_metric(("held",), pool.pages - free)
        yield pages
        yield GaugeMetricFamily("vflow_pool_page_bytes", "Bytes of a page.", pool.page_bytes)
        held = GaugeMetricFamily("vflow_memory_bytes", "Bytes of what is held beside the KV pool.", labels=("what",))
        held.add_metric(("parked_memory",), self._kv.offloaded.memory_bytes)
        held.add_metric(("parked_disk",), self._kv.offloaded.file_bytes)
        held.add_metric(("compressed_pictures",), self._images.bytes_held)
        held.add_metric(("pictures",), self._pictures.bytes_held)
        yield held
        yield GaugeMetricFamily(
            "vflow_cached_prefixes",
            "Beginnings that are kept for others who begin the same way.",
            len(self._kv.prefixes),
        )

    def _of_sessions(self) -> Iterator[Metric]:
        sessions = GaugeMetricFamily("vflow_sessions", "Sessions that live, by state.", labels=("state",))
        kv_bytes = GaugeMetricFamily(
            "vflow_session_kv_bytes",
            "Bytes of the KV pages that sessions hold, by state; a shared page counts for each.",
            labels=("state",),
        )
        living = list(self._sessions)
        states = {
            "busy": [session for session in living if session.busy],
            "resident": [each for each in living if not each.busy and each.state.snapshot.kv_bytes],
            "evicted": [each for each in living if not each.busy and not each.state.snapshot.kv_bytes],
        }
        for state, members in states.items():
            sessions.add_metric((state,), len(members))
            kv_bytes.add_metric((state,), sum(session.state.snapshot.kv_bytes for session in members))
        yield sessions
        yield kv_bytes

    def _of_watch(self) -> Iterator[Metric]:
        def counter(name: str, what: str, field: str) -> CounterMetricFamily:
            family = CounterMetricFamily(f"vflow_watch_{name}", what, labels=("strategy",))
            for strategy, totals in self._fidelity_monitor.totals.items():
                family.add_metric((strategy,), getattr(totals, field))
            return family

        yield counter("turns", "Turns that were read again without pruning.", "watched")
        yield counter("skipped", "Turns that were chosen for it, but could not be.", "skipped")
        yield counter("cosine_sum", "Cosines of their last hidden states with the unpruned ones, summed.", "cosine_sum")
        yield counter("tokens", "Tokens of their answers that were compared.", "tokens")
        yield counter("tokens_agreed", "Those that the unpruned model would have chosen.", "tokens_agreed")
        yield counter("rollbacks", "Times that the strategy was rolled back for what was seen.", "rollbacks")

    def _of_retune(self) -> Iterator[Metric]:
        operation = self._retunes.running
        metadata = None if operation is None else operation.metadata
        yield GaugeMetricFamily(
            "vflow_retune_running", "1 while a search for a strategy is under way.", bool(operation)
        )
        yield GaugeMetricFamily(
            "vflow_retune_trials", "Strategies that it will try.", metadata.trials if metadata else 0
        )
        yield GaugeMetricFamily(
            "vflow_retune_trials_done", "Strategies that it has tried.", len(metadata.tried) if metadata else 0
        )
        yield GaugeMetricFamily(
            "vflow_retune_best_objective", "Fidelity of the best so far.", metadata.best_objective if metadata else 0
        )
