"""The guard around every method: a call of no valid tenant is refused, what goes wrong ends the call with a status that
says why, and every call is logged.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog
from grpc_status import rpc_status

from vflow_server.errors import foreseen, incident
from vflow_server.tenant import tenant_of

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Any]]

_POLLED = ("Operations/GetOperation", "Operations/WaitOperation")
"""Methods that whoever follows an operation calls again and again."""

_GUARDED = ("/vflow.v1.", "/google.longrunning.Operations/")

log = structlog.get_logger(__name__)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Wraps the methods of the contract's services and of Operations; health and reflection are left alone."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Hand out the method's handler, guarded."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith(_GUARDED):
            return handler
        build, behaviour = (
            (grpc.unary_stream_rpc_method_handler, handler.unary_stream)
            if handler.response_streaming
            else (grpc.unary_unary_rpc_method_handler, handler.unary_unary)
        )
        return build(
            _guarded(behaviour, method.rpartition(".")[2]),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _guarded(method: Method, name: str) -> Method:
    async def call(request: Any, context: Context) -> Any:
        begun = time.perf_counter()
        outcome = "CANCELLED"  # unless we hear otherwise: by the client, or by its deadline
        tenant = None
        try:
            tenant = tenant_of(context)
            response = await method(request, context)
            outcome = "OK"
            return response
        except Exception as error:
            refusal = foreseen(error) or incident(error, method=name)
            outcome = refusal.reason
            await context.abort_with_status(  # type: ignore[attr-defined]  # missing from the stubs
                rpc_status.to_status(refusal.status())
            )
        finally:
            milliseconds = round((time.perf_counter() - begun) * 1000, 1)
            told = log.debug if name in _POLLED else log.info
            told("call", method=name, tenant=tenant, outcome=outcome, ms=milliseconds)

    return call
