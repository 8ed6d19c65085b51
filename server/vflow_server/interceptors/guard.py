"""The guard around every method: checks access, turns errors into statuses, and logs calls."""

from __future__ import annotations

import asyncio
import time
from traceback import clear_frames
from typing import Any

import grpc
import structlog
from grpc_status import rpc_status
from structlog.contextvars import bind_contextvars

from vflow_server.access.access import Access
from vflow_server.access.caller import bind_caller
from vflow_server.rpc.errors import foreseen, incident
from vflow_server.rpc.handlers import Behaviour, Context, around, is_open
from vflow_server.rpc.pace import Pace

_POLLED = ("Operations/GetOperation", "Operations/WaitOperation")
"""Methods that clients poll. Their calls are logged at the debug level."""

_PACED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Codes of the refusals that cost the service least, and callers nothing."""

REFUSALS, REFUSALS_AHEAD, MOST_REFUSALS_HELD = 200, 50, 1024
"""Such refusals in a second, ahead of that pace, and held back. A caller that tries again at once then waits, since a
connection can have a bounded number of calls. A refusal that others wait for is not held back."""

_LAST_WORD = 5.0
"""Seconds that the status of a call may wait for a caller that does not read."""

log = structlog.get_logger(__name__)


class Guard:
    """Guards every method. Health and reflection need no access, and are not logged: anybody could fill the log.

    Args:
        access: decides which callers may call which methods.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._pace = Pace(REFUSALS, REFUSALS_AHEAD, MOST_REFUSALS_HELD)

    def around(self, method: str, handler: Any) -> Any:
        """The handler with its calls guarded."""
        name = method.rpartition(".")[2]
        access = None if is_open(method) else self._access
        return around(handler, lambda behaviour: _guarded(behaviour, method, name, access, self._pace))


def _release_frames(error: BaseException | None) -> None:
    """Let go of what the functions had in hand that ``error`` ended, such as a request of many megabytes.

    The traceback refers to it otherwise until the garbage collector runs, or as long as the status is being sent.
    """
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _guarded(behaviour: Behaviour, method: str, name: str, access: Access | None, pace: Pace) -> Behaviour:
    async def call(request: Any, context: Context) -> Any:
        begun = time.perf_counter()
        outcome = "CANCELLED"  # stays if the client or the deadline cancels the call, which raises no Exception
        try:
            if access is not None:  # before any message of the call is read
                caller = access.caller(method, tuple(context.invocation_metadata() or ()))
                bind_caller(caller)
                bind_contextvars(tenant=caller.tenant)
            response = await behaviour(request, context)
            outcome = "OK"
            return response
        except grpc.aio.AbortError:  # the status is sent
            outcome = "ABORTED"
            raise
        except Exception as error:
            refusal = foreseen(error) or incident(error, method=name)
            outcome, status = refusal.reason, rpc_status.to_status(refusal.status())
            paced = refusal.code in _PACED and not refusal.awaited
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
            if access is not None:
                write = log.debug if name in _POLLED else log.info
                write("call", method=name, outcome=outcome, ms=milliseconds)

    return call
