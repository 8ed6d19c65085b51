"""Gauges: the state of the service at the time of a scrape, and totals that its parts keep themselves.

Belongs to the event loop's thread. Of the engine's data it reads single numbers only, which are always valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from vflow_server.monitoring.service_parts import ServiceParts
from vflow_server.telemetry.logging import dropped_lines


class Gauges(Collector):
    """Collects the gauges of one service.

    Args:
        parts: the parts of the service.
    """

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics with their present values."""
        yield from self._of_service()
        yield from self._of_memory()
        yield from self._of_messages()
        yield from self._of_sessions()
        yield from self._of_fidelity()
        yield from self._of_retune()

    def _of_service(self) -> Iterator[Metric]:
        runtime, engine = self._parts.runtime, self._parts.engine
        yield InfoMetricFamily(
            "vflow_build",
            "Version of VFlow, and the model that it serves.",
            {
                "version": version("vflowopt"),
                "model_revision": runtime.revision,
                "device": str(runtime.model.device),
                "dtype": str(runtime.model.dtype).removeprefix("torch."),
                "kv_dtype": str(runtime.pool.keys.dtype).removeprefix("torch."),
                "attention": runtime.backend.name,
            },
        )
        yield InfoMetricFamily(
            "vflow_active_strategy",
            "Strategy that new sessions get by default.",
            {"strategy": self._parts.strategies.active.name},
        )
        yield GaugeMetricFamily("vflow_engine_up", "1 while the engine works, 0 once it has failed.", engine.alive)
        yield CounterMetricFamily(
            "vflow_log_lines_dropped",
            "Log lines that could not be written: nobody read them, the disk was full, or there were too many.",
            dropped_lines(),
        )
        yield GaugeMetricFamily("vflow_requests_waiting", "Requests that wait for their first step.", engine.waiting)
        yield GaugeMetricFamily("vflow_requests_running", "Requests that share the model's steps.", engine.running)

    def _of_memory(self) -> Iterator[Metric]:
        parts, pool = self._parts, self._parts.runtime.pool
        pages = GaugeMetricFamily("vflow_kv_pages", "Pages of the KV pool, by state.", labels=("state",))
        free = pool.free_pages
        pages.add_metric(("free",), free)
        pages.add_metric(("used",), pool.pages - free)
        yield pages
        yield GaugeMetricFamily("vflow_kv_page_bytes", "Bytes of one page of the KV pool.", pool.page_bytes)
        offloaded = GaugeMetricFamily(
            "vflow_offloaded_bytes", "Bytes of idle sessions' KV caches outside the pool, by tier.", labels=("tier",)
        )
        offloaded.add_metric(("host_memory",), parts.kv.offloaded.memory_bytes)
        offloaded.add_metric(("disk",), parts.kv.offloaded.file_bytes)
        yield offloaded
        pictures = GaugeMetricFamily(
            "vflow_picture_bytes", "Bytes of pictures in memory: decoded, and compressed for reuse.", labels=("form",)
        )
        pictures.add_metric(("decoded",), parts.pictures.bytes_held)
        pictures.add_metric(("compressed",), parts.images.bytes_held)
        yield pictures
        yield GaugeMetricFamily(
            "vflow_prefix_cache_entries", "Prefixes whose KV pages are kept for other sessions.", len(parts.kv.prefixes)
        )

    def _of_messages(self) -> Iterator[Metric]:
        messages = self._parts.messages
        yield GaugeMetricFamily("vflow_messages_on_the_way", "Requests that are being received.", messages.on_the_way)
        yield GaugeMetricFamily("vflow_messages_waiting", "Calls whose request waits to be received.", messages.waiting)
        yield GaugeMetricFamily(
            "vflow_message_bytes", "Bytes of requests and answers in use that are over 64 KiB.", messages.bytes_held
        )
        calls = GaugeMetricFamily("vflow_calls_open", "Calls that are open, by access.", labels=("access",))
        calls.add_metric(("tenant",), messages.calls.total)
        calls.add_metric(("none",), messages.open_calls.total + messages.open_streams.total)
        yield calls

    def _of_sessions(self) -> Iterator[Metric]:
        sessions = GaugeMetricFamily("vflow_sessions", "Sessions, by state.", labels=("state",))
        kv_bytes = GaugeMetricFamily(
            "vflow_session_kv_bytes",
            "Bytes of the KV pages that sessions hold, by state; a shared page counts for each session.",
            labels=("state",),
        )
        living = list(self._parts.sessions)
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

    def _of_fidelity(self) -> Iterator[Metric]:
        totals = self._parts.fidelity_monitor.totals
        cosine = SummaryMetricFamily(
            "vflow_fidelity_cosine",
            "Cosine of a turn's last hidden state with the unpruned model's; one observation for each turn compared.",
            labels=("strategy",),
        )
        for strategy, each in totals.items():
            cosine.add_metric((strategy,), each.watched, each.cosine_sum)
        yield cosine

        def counter(name: str, what: str, field: str) -> CounterMetricFamily:
            family = CounterMetricFamily(f"vflow_fidelity_{name}", what, labels=("strategy",))
            for strategy, each in totals.items():
                family.add_metric((strategy,), getattr(each, field))
            return family

        yield counter("turns_skipped", "Turns that were sampled for comparison but could not be compared.", "skipped")
        yield counter("tokens_compared", "Tokens of answers that were compared with the unpruned model.", "tokens")
        yield counter(
            "tokens_agreed", "Compared tokens that the unpruned model would have chosen, too.", "tokens_agreed"
        )
        yield counter("rollbacks", "Times that a strategy was rolled back because of its cosine.", "rollbacks")

    def _of_retune(self) -> Iterator[Metric]:
        operation = self._parts.retunes.running
        metadata = None if operation is None else operation.metadata
        yield GaugeMetricFamily("vflow_retune_running", "1 while a search for a strategy is running.", bool(operation))
        yield GaugeMetricFamily(
            "vflow_retune_trials", "Strategies that the search will try.", metadata.trials if metadata else 0
        )
        yield GaugeMetricFamily(
            "vflow_retune_trials_done", "Strategies that it has tried.", len(metadata.tried) if metadata else 0
        )
        yield GaugeMetricFamily(
            "vflow_retune_best_objective",
            "Fidelity of the best strategy so far.",
            metadata.best_objective if metadata else 0,
        )
