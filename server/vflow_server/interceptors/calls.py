"""Counts, times and traces every call of the contract, and adds its ids to the log lines.

The ids are structlog's context variables: ``request`` (the caller's ``x-request-id``, or a generated one) and ``trace``
are set here, ``tenant`` and ``session`` where they become known.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

import grpc
from structlog.contextvars import bind_contextvars, get_contextvars

from vflow_server.rpc.handlers import Behaviour, Context, around, is_open
from vflow_server.telemetry.metrics import Metrics
from vflow_server.telemetry.tracing import Tracing

REQUEST_ID = "x-request-id"
"""Request metadata with the caller's own id of the call, for the log."""

NEAR = 0.1
"""Seconds before its deadline in which a cancelled call counts as DEADLINE_EXCEEDED: the caller's deadline passes
earlier than the server's, by the time that the request took to arrive."""

_REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,64}")

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Calls:
    """The outermost layer, so that it also sees the calls that others refuse.

    Args:
        metrics: counts the calls.
        tracing: traces them.
    """

    def __init__(self, metrics: Metrics, tracing: Tracing) -> None:
        self._metrics = metrics
        self._tracing = tracing

    def around(self, method: str, handler: Any) -> Any:
        """The handler with its calls observed; those of health checks and reflection are not."""
        if is_open(method):
            return handler
        return around(handler, lambda behaviour: self._observed(behaviour, method.removeprefix("/")))

    def _observed(self, behaviour: Behaviour, name: str) -> Behaviour:
        short = name.rpartition(".")[2]

        async def call(request: Any, context: Context) -> Any:
            begun = time.perf_counter()
            metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
            code = grpc.StatusCode.CANCELLED  # stays if the call is cancelled, which raises no Exception
            with self._metrics.call_in_flight(), self._tracing.call(name, metadata) as span:
                bind_contextvars(request=_request_id(metadata), **({"trace": span.trace} if span.trace else {}))
                try:
                    response = await behaviour(request, context)
                    code = grpc.StatusCode.OK
                    return response
                except Exception:  # the guard, which is called within, has set the status
                    code = _CODES.get(_number(context.code()), grpc.StatusCode.UNKNOWN)
                    raise
                finally:
                    left = context.time_remaining()
                    if code is grpc.StatusCode.CANCELLED and left is not None and left < NEAR:
                        code = grpc.StatusCode.DEADLINE_EXCEEDED
                    self._metrics.call(short, code.name, time.perf_counter() - begun)
                    span.ended(code, get_contextvars())

        return call


def _request_id(metadata: Mapping[str, str | bytes]) -> str:
    named = metadata.get(REQUEST_ID, "")
    return named if isinstance(named, str) and _REQUEST_ID.fullmatch(named) else secrets.token_hex(6)


def _number(code: Any) -> int:
    """The number of a status. gRPC stores a number, contrary to its documentation."""
    return int(code.value[0]) if isinstance(code, grpc.StatusCode) else int(code)
