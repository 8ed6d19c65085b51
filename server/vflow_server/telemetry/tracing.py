"""Traces of calls. Here: the trace that a caller says its call belongs to, for the log, and no spans of our own.

:mod:`vflow_server.telemetry.spans` makes spans and sends them away, where that is set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

Metadata = Mapping[str, str | bytes]

Phase = tuple[str, float]
"""Name of a part of a call's work, and the seconds that it took."""

_TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class CallSpan:
    """One call in its trace.

    Attributes:
        trace: the trace's id in hex; empty where there is none.
    """

    def __init__(self, trace: str = "") -> None:
        self.trace = trace

    def ended(self, code: grpc.StatusCode, ids: Mapping[str, Any]) -> None:
        """The call has ended with ``code``; ``ids`` say whose it was."""


class Tracing:
    """Finds the trace of a call, and leaves no other trace of it."""

    @contextmanager
    def call(self, method: str, metadata: Metadata) -> Iterator[CallSpan]:
        """Around a call of ``method`` (``package.Service/Method``) with the request metadata ``metadata``."""
        given = metadata.get("traceparent", "")
        match = _TRACEPARENT.fullmatch(given) if isinstance(given, str) else None
        yield CallSpan(match[1] if match else "")

    def phases(self, phases: Sequence[Phase]) -> None:
        """The current call, which ends now, was made up of ``phases``, one after the other."""

    def close(self) -> None:
        """Send what is left to send; returns when that is done, or was given up."""
