"""Metrics: what the service counts and measures as it works, for Prometheus.

Each service has its own registry, so that several services can run in one process. Other modules report events; names,
units and buckets are defined here. Values that are read at a scrape instead of being counted as they happen are in
:mod:`vflow_server.monitoring.gauges`. For any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from vflow_client.v1 import conversations_pb2, images_pb2

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets of durations: from a decode step of a small model to the longest turns."""

SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Buckets of batch sizes."""

DECODING_OUTCOMES = ("decoded", "refused", "out_of_time", "out_of_memory", "crashed", "cancelled", "failed")
"""How decoding a picture can end: with pixels; as no valid picture; the worker was ended by its limit of time, by its
limit of memory, or by the file; the caller had gone; no worker could be had."""


class Metrics:
    """The instruments of one service.

    Attributes:
        registry: the registry of the instruments; other collectors may be registered here, too.
    """

    def __init__(self) -> None:
        # The `_created` series would be a sixth of all series, and nothing reads them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._make_of_calls()
        self._make_of_turns()
        self._make_of_pictures()
        self._make_of_engine()
        self._make_of_journal()

    @contextmanager
    def call_in_flight(self) -> Iterator[None]:
        """Count a call as running within the block."""
        with self._calls_in_flight.track_inprogress():
            yield

    def call(self, method: str, code: str, seconds: float) -> None:
        """Note that a call of ``method`` has ended with the status ``code`` after ``seconds``."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)

    def turn(self, finished: conversations_pb2.Finished) -> None:
        """Note that a turn has finished, and the pictures that it added."""
        receipt, usage = finished.receipt, finished.usage
        self._turns.labels(conversations_pb2.Finished.FinishReason.Name(finished.finish_reason).lower()).inc()
        self._turn_seconds.observe(receipt.total_ms / 1000)
        self._queue_seconds.observe(receipt.queue_ms / 1000)
        self._first_token_seconds.observe(receipt.first_token_ms / 1000)
        if usage.completion_tokens > 1:
            self._token_seconds.observe(receipt.decode_ms / 1000 / (usage.completion_tokens - 1))
        self._prompt_tokens.labels("reused").inc(usage.reused_tokens)
        self._prompt_tokens.labels("computed").inc(receipt.new_prompt_tokens)
        self._completion_tokens.inc(usage.completion_tokens)
        if receipt.restored:
            tier = conversations_pb2.TurnReceipt.RestoredFrom.Name(receipt.restored_from)
            self._restores.labels(tier.lower()).inc()
        for picture in finished.images:
            self.picture(picture)

    def picture(self, receipt: images_pb2.ImageReceipt) -> None:
        """Note that a picture was added to a session, or compressed for a caller."""
        self._pictures.labels("hit" if receipt.cache_hit else "miss").inc()
        self._visual_tokens.inc(receipt.visual_tokens)
        for number, kept in enumerate(receipt.kept_tokens):
            self._kept_tokens.labels(str(number)).inc(kept)
        self._recycled_tokens.inc(receipt.recycled_tokens)
        self._kv_bytes.inc(receipt.kv_bytes)
        self._kv_bytes_saved.inc(max(receipt.kv_bytes_full - receipt.kv_bytes, 0))
        if not receipt.cache_hit:
            for phase in ("encode", "score", "prune"):
                self._picture_seconds.labels(phase).observe(getattr(receipt, f"{phase}_ms") / 1000)
        if receipt.prefill_ms:
            self._picture_seconds.labels("prefill").observe(receipt.prefill_ms / 1000)

    def decoded(self, outcome: str) -> None:
        """Note how decoding a picture ended: see ``DECODING_OUTCOMES``."""
        self._decodings.labels(outcome).inc()

    def step(self, seconds: float, pending: Sequence[int], ran: Sequence[int]) -> None:
        """Note that the model ran a step.

        Args:
            seconds: duration; on a CUDA device a step that draws no token may only be queued by then.
            pending: tokens of each sequence of the batch that were not cached; 1 if it is decoding.
            ran: how many of them the step ran.
        """
        self._step_seconds.observe(seconds)
        self._batch.observe(len(ran))
        decoded = sum(tokens == 1 for tokens in pending)
        self._decoded.inc(decoded)
        self._prefilled.inc(sum(ran) - decoded)

    def evicted(self, held_by: str) -> None:
        """Note that a holder of KV pages was evicted: ``search``, ``prefix``, ``idle`` or ``running``."""
        self._evictions.labels(held_by).inc()

    def prefix(self, *, hit: bool) -> None:
        """Note a lookup of a cached prefix."""
        self._prefixes.labels("hit" if hit else "miss").inc()

    def committed(self, seconds: float) -> None:
        """Note that the journal of sessions was committed to the disk in ``seconds``."""
        self._journal_seconds.observe(seconds)

    def commit_failed(self) -> None:
        """Note that a commit of the journal of sessions failed."""
        self._journal_failures.inc()

    def _make_of_calls(self) -> None:
        self._calls = Counter(
            "vflow_calls",
            "gRPC calls that have ended, by method and status code.",
            ("method", "code"),
            registry=self.registry,
        )
        self._call_seconds = Histogram(
            "vflow_call_seconds",
            "Seconds from a gRPC call's arrival to its end, streaming included.",
            ("method",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._calls_in_flight = Gauge("vflow_calls_in_flight", "gRPC calls in progress.", registry=self.registry)

    def _make_of_turns(self) -> None:
        def seconds(name: str, what: str) -> Histogram:
            return Histogram(name, what, buckets=SECONDS, registry=self.registry)

        self._turns = Counter(
            "vflow_turns",
            "Turns that were answered to their end, by finish reason.",
            ("reason",),
            registry=self.registry,
        )
        self._turn_seconds = seconds("vflow_turn_seconds", "Seconds from a turn's arrival to the end of its answer.")
        self._queue_seconds = seconds("vflow_queue_seconds", "Seconds that a turn waited for its first step.")
        self._first_token_seconds = seconds(
            "vflow_first_token_seconds", "Seconds from a turn's arrival to the first token of its answer."
        )
        self._token_seconds = seconds(
            "vflow_token_seconds", "Seconds for each token of an answer after the first, averaged over the answer."
        )
        self._prompt_tokens = Counter(
            "vflow_prompt_tokens",
            "Tokens of prompts: reused from the KV cache, or computed by the model.",
            ("source",),
            registry=self.registry,
        )
        self._completion_tokens = Counter("vflow_completion_tokens", "Tokens of answers.", registry=self.registry)
        self._restores = Counter(
            "vflow_restores",
            "Turns whose session had lost its KV pages, by the tier they were restored from (log: recomputed).",
            ("tier",),
            registry=self.registry,
        )
        for tier in ("host_memory", "disk", "log"):
            self._restores.labels(tier)

    def _make_of_pictures(self) -> None:
        self._pictures = Counter(
            "vflow_pictures",
            "Pictures added; a hit was already compressed, for the same tenant and strategy.",
            ("cache",),
            registry=self.registry,
        )
        self._decodings = Counter(
            "vflow_picture_decodings",
            "Picture files that worker processes were given, by outcome; a worker that ran out of time or crashed was "
            "replaced.",
            ("outcome",),
            registry=self.registry,
        )
        for outcome in DECODING_OUTCOMES:
            self._decodings.labels(outcome)
        self._picture_seconds = Histogram(
            "vflow_picture_seconds",
            "Seconds that a picture took, by phase; prefill only of pictures added ahead of a question.",
            ("phase",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._visual_tokens = Counter(
            "vflow_visual_tokens", "Visual tokens of the pictures added, before pruning.", registry=self.registry
        )
        self._kept_tokens = Counter(
            "vflow_visual_tokens_kept",
            "Visual tokens of the pictures added, after pruning, by stage of the decoder (0 is the first).",
            ("stage",),
            registry=self.registry,
        )
        self._recycled_tokens = Counter(
            "vflow_visual_tokens_recycled",
            "Tokens kept in the first stage that are averages of dropped tokens.",
            registry=self.registry,
        )
        self._kv_bytes = Counter(
            "vflow_picture_kv_bytes", "Bytes of KV cache for the pictures added.", registry=self.registry
        )
        self._kv_bytes_saved = Counter(
            "vflow_picture_kv_bytes_saved",
            "Bytes of KV cache that pruning saved.",
            registry=self.registry,
        )

    def _make_of_engine(self) -> None:
        self._step_seconds = Histogram(
            "vflow_step_seconds", "Seconds of a step of the model.", buckets=SECONDS, registry=self.registry
        )
        self._batch = Histogram(
            "vflow_batch_size", "Sequences in a step of the model.", buckets=SEQUENCES, registry=self.registry
        )
        tokens = Counter(
            "vflow_model_tokens", "Tokens that the model processed, by phase.", ("phase",), registry=self.registry
        )
        self._prefilled, self._decoded = tokens.labels("prefill"), tokens.labels("decode")
        self._evictions = Counter(
            "vflow_evictions",
            "Times that a sequence lost its KV pages because others needed them, by what it belonged to.",
            ("held_by",),
            registry=self.registry,
        )
        for held_by in ("search", "prefix", "idle", "running"):
            self._evictions.labels(held_by)  # exported from the start, as zero
        self._prefixes = Counter(
            "vflow_prefix_cache_lookups",
            "Lookups of a cached prefix, by sequences with pictures and no KV cache.",
            ("cache",),
            registry=self.registry,
        )

    def _make_of_journal(self) -> None:
        self._journal_seconds = Histogram(
            "vflow_journal_commit_seconds",
            "Seconds that a commit of the session journal took, to the disk.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._journal_failures = Counter(
            "vflow_journal_failures", "Commits of the session journal that failed.", registry=self.registry
        )
