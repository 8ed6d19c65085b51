"""The guard around every method: checks access, turns errors into statuses, and logs calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from traceback import clear_frames
from typing import Any

import grpc
import structlog
from grpc_status import rpc_status
from structlog.contextvars import bind_contextvars

from vflow_server.access.access import Access
from vflow_server.access.caller import Caller, bind_caller
from vflow_server.rpc.errors import ServiceError, foreseen, incident
from vflow_server.rpc.handlers import Behaviour, Context, around, is_open
from vflow_server.rpc.pace import Pace

_POLLED = ("Operations/GetOperation", "Operations/WaitOperation")
"""Methods that clients poll. Their calls are logged at the debug level."""

_PACED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Codes of the refusals that cost the service least, and callers nothing."""

REFUSALS, REFUSALS_AHEAD, MOST_REFUSALS_HELD = 100, 50, 1024
"""Such refusals in a second, ahead of that pace, and held back. A caller that tries again at once then waits, since a
connection can have a bounded number of calls."""

_LAST_WORD = 5.0
"""Seconds that the status of a call may wait for a caller that does not read."""

log = structlog.get_logger(__name__)


class Guard(grpc.aio.ServerInterceptor):
    """Guards every method. Health and reflection need no access, and are not logged: anybody could fill the log.

    Args:
        access: decides which callers may call which methods.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._pace = Pace(REFUSALS, REFUSALS_AHEAD, MOST_REFUSALS_HELD)

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Wrap the method's handler, so that its calls are guarded."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None:
            return handler
        name = method.rpartition(".")[2]
        if is_open(method):
            return around(handler, lambda behaviour: _guarded(behaviour, name, None, self._pace, open=True))
        try:
            caller = self._access.caller(method, handler_call_details.invocation_metadata or ())
        except ServiceError as error:
            refusal = error
            # A handler with a stream of requests is called before the first one is received. So no message of a caller
            # without access is read.
            return around(handler, lambda _: _guarded(_refusing(refusal), name, None, self._pace))
        return around(handler, lambda behaviour: _guarded(behaviour, name, caller, self._pace))


def _refusing(refusal: ServiceError) -> Behaviour:
    async def refuse(requests: Any, context: Context) -> None:
        raise refusal

    return refuse


def _release_frames(error: BaseException | None) -> None:
    """Let go of what the functions had in hand that ``error`` ended, such as a request of many megabytes.

    The traceback refers to it otherwise until the garbage collector runs, or as long as the status is being sent.
    """
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _guarded(behaviour: Behaviour, name: str, caller: Caller | None, pace: Pace, *, open: bool = False) -> Behaviour:
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
        except grpc.aio.AbortError:  # the status is sent
            outcome = "ABORTED"
            raise
        except Exception as error:
            refusal = foreseen(error) or incident(error, method=name)
            outcome, status = refusal.reason, rpc_status.to_status(refusal.status())
            paced = refusal.code in _PACED
            del refusal
            _release_frames(error)
            if paced:
                await pace.keep()
            try:
                async with asyncio.timeout(_LAST_WORD):
                    await context.abort_with_status(status)
            except TimeoutError:  # the caller does not read: leave it to gRPC to notice that it is gone
                raise asyncio.CancelledError from None
        finally:
            milliseconds = round((time.perf_counter() - begun) * 1000, 1)
            if not open:
                write = log.debug if name in _POLLED else log.info
                write("call", method=name, outcome=outcome, ms=milliseconds)

    return call
