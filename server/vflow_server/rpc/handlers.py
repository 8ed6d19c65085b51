"""Wrapping the gRPC handlers of methods."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]
"""The function of a method. It gets a request, or the stream of them, and writes streamed responses to the context."""


CONTRACT = ("/vflow.v1.", "/google.longrunning.Operations/")
"""Prefixes of the methods that need access. The others, health checks and reflection, are open to everybody."""


def is_open(method: str) -> bool:
    """Whether ``method`` (``/package.Service/Method``) needs no access."""
    return not method.startswith(CONTRACT)


def around(handler: Any, wrap: Callable[[Behaviour], Behaviour]) -> Any:
    """A copy of ``handler`` with ``wrap`` around its behaviour."""
    build, behaviour = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }[bool(handler.request_streaming), bool(handler.response_streaming)]
    return build(
        wrap(behaviour),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
