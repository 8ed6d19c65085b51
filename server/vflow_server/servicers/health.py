"""The health of the services, as gRPC's health protocol (``grpc.health.v1``) tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListResponse

from vflow_server.rpc.answer_writer import AnswerWriter
from vflow_server.rpc.handlers import Context

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no stubs
    """Tells whether the services serve. Belongs to the event loop's thread.

    The servicer of grpcio-health-checking waits for all who watch before it changes a status, so one who reads nothing
    would keep the service from stopping.

    Args:
        names: full names of the services; the empty name is that of all together.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._status = NOT_SERVING
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        """Tell from now on whether the services serve."""
        self._status = SERVING if serving else NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        """Tell the status of a service."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:80]!r}")
        return HealthCheckResponse(status=self._status)

    async def List(self, request: Message, context: Context) -> HealthListResponse:
        """Tell the status of all services."""
        return HealthListResponse(statuses={name: HealthCheckResponse(status=self._status) for name in self._names})

    async def Watch(self, request: HealthCheckRequest, context: Context) -> None:
        """Tell the status of a service, and again whenever it changes."""
        known = request.service in self._names
        with AnswerWriter(context) as writer:
            while True:
                changed = self._changed
                await writer.write(HealthCheckResponse(status=self._status if known else UNKNOWN))
                await changed.wait()
