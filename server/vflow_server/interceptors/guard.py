"""The guard around every method: a caller without access is refused before anything of its request is read, what goes
wrong ends the call with a status that says why, and every call is logged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_status import rpc_status
from structlog.contextvars import bind_contextvars

from vflow_server.access.access import Access
from vflow_server.access.caller import Caller, bind_caller
from vflow_server.rpc.errors import ServiceError, foreseen, incident
from vflow_server.rpc.handlers import Behaviour, Context, around

_POLLED = ("Operations/GetOperation", "Operations/WaitOperation")
"""Methods that whoever follows an operation calls again and again."""

_LAST_WORD = 5.0
"""Seconds for a caller to take the status of its call; from then on the connection alone remembers it."""

_GUARDED = ("/vflow.v1.", "/google.longrunning.Operations/")

log = structlog.get_logger(__name__)


class Guard(grpc.aio.ServerInterceptor):
    """Wraps the methods of the contract's services and of Operations; health and reflection are open to all.

    Args:
        access: decides who may call what.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Hand out the method's handler, guarded."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith(_GUARDED):
            return handler
        name = method.rpartition(".")[2]
        try:
            caller = self._access.caller(method, handler_call_details.invocation_metadata or ())
        except ServiceError as refusal:
            # As a stream of requests it is called before the first one is received: so of what a caller without access
            # sends no message is buffered and none is parsed.
            return grpc.stream_unary_rpc_method_handler(_guarded(_refusing(refusal), name, None))
        if handler.request_streaming:
            return around(handler, lambda behaviour: _guarded(behaviour, name, caller))
        parse = handler.request_deserializer
        return around(handler, lambda behaviour: _guarded(_parsing(behaviour, parse), name, caller), raw=True)


def _refusing(refusal: ServiceError) -> Behaviour:
    async def refuse(requests: Any, context: Context) -> None:
        raise refusal

    return refuse


def _parsing(behaviour: Behaviour, parse: Callable[[bytes], Any]) -> Behaviour:
    """``behaviour`` for bytes: left to gRPC, those that are no message would end the call as a fault of ours."""

    async def read(message: bytes, context: Context) -> Any:
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
        outcome = "CANCELLED"  # unless we hear otherwise: by the client, or by its deadline
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
            except TimeoutError:  # who reads nothing does not hear of it, either: gRPC is left to see the caller go
                raise asyncio.CancelledError from None
        finally:
            milliseconds = round((time.perf_counter() - begun) * 1000, 1)
            write = log.debug if name in _POLLED else log.info
            write("call", method=name, outcome=outcome, ms=milliseconds)

    return call
