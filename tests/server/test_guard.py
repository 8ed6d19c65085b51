"""Refusals that are held back, and those that others wait for."""

import asyncio
from typing import Any, cast

import grpc
import pytest

from vflow_server.access.access import Access
from vflow_server.interceptors.guard import Guard
from vflow_server.rpc.errors import CapacityExhausted
from vflow_server.rpc.handlers import Context
from vflow_server.rpc.pace import Pace


class Ended(Exception):
    """Stands for what gRPC raises when a status is sent."""


class OneCall:
    """The part of a call's context that the guard uses."""

    async def abort_with_status(self, status: Any) -> None:
        raise Ended


async def refused(*, awaited: bool) -> None:
    """A call of an open method that is refused for want of room."""
    refusal = CapacityExhausted("messages", "there is no room; retry later")
    refusal.awaited = awaited

    async def refuse(request: Any, context: Context) -> None:
        raise refusal

    handler = Guard(cast(Access, None)).around(
        "/grpc.health.v1.Health/Check", grpc.unary_unary_rpc_method_handler(cast(Any, refuse))
    )
    async with asyncio.timeout(0.2):
        await handler.unary_unary(None, OneCall())


def test_a_refusal_is_held_back_unless_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def keep(self: Pace) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Pace, "keep", keep)
    with pytest.raises(TimeoutError):
        asyncio.run(refused(awaited=False))
    with pytest.raises(Ended):
        asyncio.run(refused(awaited=True))
