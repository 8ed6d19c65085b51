"""Traces of calls. This module only reads the id of a caller's trace, for the log, and makes no spans.

:mod:`vflow_server.telemetry.spans` makes spans and exports them, if that is enabled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

Metadata = Mapping[str, str | bytes]

Phase = tuple[str, float]
"""Name of a part of a call's work, and its duration in seconds."""

_TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class CallSpan:
    """One call in its trace.

    Attributes:
        trace: id of the trace in hex; empty if there is none.
    """

    def __init__(self, trace: str = "") -> None:
        self.trace = trace

    def ended(self, code: grpc.StatusCode, ids: Mapping[str, Any]) -> None:
        """Note the end of the call with ``code``; ``ids`` are its request, tenant and session."""


class Tracing:
    """Reads the trace ids of calls."""

    @contextmanager
    def call(self, method: str, metadata: Metadata) -> Iterator[CallSpan]:
        """Trace a call of ``method`` (``package.Service/Method``) with the request ``metadata`` within the block."""
        given = metadata.get("traceparent", "")
        match = _TRACEPARENT.fullmatch(given) if isinstance(given, str) else None
        yield CallSpan(match[1] if match else "")

    def phases(self, phases: Sequence[Phase]) -> None:
        """Note that the current call, which ends now, consisted of ``phases``, one after the other."""

    def close(self) -> None:
        """Export the remaining spans; returns when that is done or has failed."""
