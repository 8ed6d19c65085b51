"""Spans of calls, exported to an OpenTelemetry collector by OTLP over gRPC. Needs the extra ``otel``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vflow_server.telemetry.tracing import CallSpan, Metadata, Phase, Tracing

PATIENCE = 5
"""Seconds that an attempt to export spans may take: an unreachable collector must not delay the shutdown for long."""

# The status codes that the semantic conventions for RPC count as errors of the server.
_FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


class _Span(CallSpan):
    def __init__(self, span: trace.Span) -> None:
        super().__init__(trace.format_trace_id(span.get_span_context().trace_id))
        self._span = span

    def ended(self, code: grpc.StatusCode, ids: Mapping[str, Any]) -> None:
        self._span.set_attribute("rpc.grpc.status_code", code.value[0])
        for name in ("tenant", "session", "request"):
            if name in ids:
                self._span.set_attribute(f"vflow.{name}", str(ids[name]))
        if code in _FAULTS:
            self._span.set_status(StatusCode.ERROR, code.name)


class Spans(Tracing):
    """Makes a span of every call, in the caller's trace if it names one, and a child span of each phase.

    Args:
        endpoint: ``http://host:port`` of an OTLP receiver, ``https://`` for TLS.
    """

    def __init__(self, endpoint: str) -> None:
        resource = Resource.create({SERVICE_NAME: "vflow", SERVICE_VERSION: version("vflowopt")})
        # Not the process's global provider: several services may live in one process.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=PATIENCE)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vflow")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def call(self, method: str, metadata: Metadata) -> Iterator[CallSpan]:
        """Make a span of a call of ``method`` within the block."""
        service, _, name = method.partition("/")
        with self._tracer.start_as_current_span(
            method,
            self._propagator.extract({key: str(value) for key, value in metadata.items()}),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
            # Refusals are no errors of the server, and their messages may quote a caller's text.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield _Span(span)

    def phases(self, phases: Sequence[Phase]) -> None:
        """Make a child span of each phase. Receipts hold durations only, so the spans are placed end to end."""
        at = time.time_ns() - sum(_nanoseconds(seconds) for _, seconds in phases)
        for name, seconds in phases:
            span = self._tracer.start_span(name, start_time=at)
            at += _nanoseconds(seconds)
            span.end(end_time=at)

    def close(self) -> None:
        """Export the remaining spans."""
        self._provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
