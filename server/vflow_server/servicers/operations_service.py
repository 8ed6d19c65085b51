"""The service ``google.longrunning.Operations``: follows, cancels and deletes searches."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import duration_pb2, empty_pb2

from vflow_server.access.caller import current_caller
from vflow_server.rpc.errors import InvalidRequest
from vflow_server.rpc.names import check_name
from vflow_server.rpc.paging import Pager
from vflow_server.tuning.operations import Operation, OperationStore

Context = grpc.aio.ServicerContext[Any, Any]

LONGEST_WAIT = 60.0
"""Seconds that a call may wait for the end of an operation; then it gets the present state."""

MOST_SECONDS = 315_576_000_000
"""Seconds of a ``google.protobuf.Duration`` at most: 10,000 years."""

_MARGIN = 0.2
"""Seconds before the deadline of a call at which it is answered, so that the answer arrives in time."""


class Operations(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]  # it has no stubs
    """Serves the operations of the caller's tenant.

    Args:
        operations: the operations that are known.
    """

    def __init__(self, operations: OperationStore) -> None:
        self._operations = operations
        self._pager = Pager()

    async def GetOperation(
        self, request: operations_pb2.GetOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """Read an operation."""
        return self._find(request.name).message()

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: Context
    ) -> operations_pb2.ListOperationsResponse:
        """List the tenant's operations, oldest first."""
        if request.name not in ("", "operations"):
            raise InvalidRequest(
                "NAME_INVALID",
                "name",
                f"{request.name[:80]!r} holds no operations; list 'operations', or leave the name out",
                metadata={"name": request.name[:80]},
            )
        if request.filter:
            raise InvalidRequest("OPTION_OUT_OF_RANGE", "filter", "operations cannot be filtered; leave the filter out")
        page, token = self._pager.page(
            self._operations.of(current_caller().tenant),
            lambda operation: operation.number,
            request.page_size,
            request.page_token,
        )
        return operations_pb2.ListOperationsResponse(
            operations=[operation.message() for operation in page], next_page_token=token
        )

    async def CancelOperation(
        self, request: operations_pb2.CancelOperationRequest, context: Context
    ) -> empty_pb2.Empty:
        """Cancel an operation; no effect on one that has ended."""
        self._find(request.name).cancel()
        return empty_pb2.Empty()

    async def DeleteOperation(
        self, request: operations_pb2.DeleteOperationRequest, context: Context
    ) -> empty_pb2.Empty:
        """Delete an operation. One that is running continues, and is forgotten when it has ended."""
        await self._operations.delete(self._find(request.name))
        return empty_pb2.Empty()

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """Wait a bounded time for the end of an operation; returns its state then."""
        patience = [LONGEST_WAIT]
        if request.HasField("timeout"):
            patience.append(_seconds(request.timeout))
        operation = self._find(request.name)
        if (left := context.time_remaining()) is not None:
            patience.append(left - _MARGIN)
        with suppress(TimeoutError):
            await asyncio.wait_for(operation.ended.wait(), max(min(patience), 0.0))
        return operation.message()

    def _find(self, name: str) -> Operation:
        return self._operations.get(current_caller().tenant, check_name(name, "operations", "name"))


def _seconds(timeout: duration_pb2.Duration) -> float:
    """The timeout of a request.

    Raises:
        InvalidRequest: it is negative, or no valid duration.
    """
    if not (0 <= timeout.seconds <= MOST_SECONDS and 0 <= timeout.nanos < 10**9):
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            "timeout",
            f"timeout is {timeout.seconds} seconds and {timeout.nanos} nanoseconds; give 0 to {MOST_SECONDS} seconds, "
            "and 0 to 999999999 nanoseconds",
            metadata={"value": timeout.seconds, "min": 0, "max": MOST_SECONDS},
        )
    return timeout.seconds + timeout.nanos / 1e9
