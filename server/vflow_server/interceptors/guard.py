"""The guard around every method: checks access before a request is read, turns errors into statuses, and logs calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from grpc_status import rpc_status
from structlog.contextvars import bind_contextvars

from vflow_server.access.access import Access
from vflow_server.access.caller import Caller, bind_caller
from vflow_server.rpc.errors import ServiceError, foreseen, incident
from vflow_server.rpc.handlers import Behaviour, Context, around
from vflow_server.rpc.message_scan import MOST_FIELDS, has_too_many_fields

_POLLED = ("Operations/GetOperation", "Operations/WaitOperation")
"""Methods that clients poll. Their calls are logged at the debug level."""

_LAST_WORD = 5.0
"""Seconds that the status of a call may wait for a caller that does not read."""

_GUARDED = ("/vflow.v1.", "/google.longrunning.Operations/")

log = structlog.get_logger(__name__)


class Guard(grpc.aio.ServerInterceptor):
    """Guards the methods of the contract's services and of Operations; health and reflection need no access.

    Args:
        access: decides which callers may call which methods.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Wrap the method's handler, so that its calls are guarded."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith(_GUARDED):
            return handler
        name = method.rpartition(".")[2]
        try:
            caller = self._access.caller(method, handler_call_details.invocation_metadata or ())
        except ServiceError as refusal:
            # A handler with a stream of requests is called before the first one is received. So no message of a caller
            # without access is buffered or parsed.
            return grpc.stream_unary_rpc_method_handler(_guarded(_refusing(refusal), name, None))
        if handler.request_streaming:
            return around(handler, lambda behaviour: _guarded(behaviour, name, caller))
        parse = handler.request_deserializer
        type = descriptor_pool.Default().FindMethodByName(method[1:].replace("/", ".")).input_type
        return around(handler, lambda behaviour: _guarded(_parsing(behaviour, parse, type), name, caller), raw=True)


def _refusing(refusal: ServiceError) -> Behaviour:
    async def refuse(requests: Any, context: Context) -> None:
        raise refusal

    return refuse


def _parsing(behaviour: Behaviour, parse: Callable[[bytes], Any], type: Descriptor) -> Behaviour:
    """``behaviour`` for unparsed requests. If gRPC parsed them, an invalid one would end the call with INTERNAL."""

    async def read(message: bytes, context: Context) -> Any:
        if has_too_many_fields(message, type):
            raise ServiceError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "MESSAGE_INVALID",
                f"the request has more than {MOST_FIELDS} fields; send fewer parts, frames, samples or numbers",
            )
        try:
            request = parse(message)
        except DecodeError as error:
            raise ServiceError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "MESSAGE_INVALID",
                f"the request is not the message that this method takes ({error}); send what the contract says",
            ) from None
        return await behaviour(request, context)

    return read


def _guarded(behaviour: Behaviour, name: str, caller: Caller | None) -> Behaviour:
    async def call(request: Any, context: Context) -> Any:
        begun = time.perf_counter()
        outcome = "CANCELLED"  # stays if the client or the deadline cancels the call, which raises no Exception
        if caller is not None:
            bind_caller(caller)
            bind_contextvars(tenant=caller.tenant)
        try:
            response = await behaviour(request, context)
            outcome = "OK"
            return response
        except Exception as error:
            refusal = foreseen(error) or incident(error, method=name)
            outcome = refusal.reason
            try:
                async with asyncio.timeout(_LAST_WORD):
                    await context.abort_with_status(rpc_status.to_status(refusal.status()))
            except TimeoutError:  # the caller does not read: leave it to gRPC to notice that it is gone
                raise asyncio.CancelledError from None
        finally:
            milliseconds = round((time.perf_counter() - begun) * 1000, 1)
            write = log.debug if name in _POLLED else log.info
            write("call", method=name, outcome=outcome, ms=milliseconds)

    return call
