"""Draining: when the service stops, running calls continue, and new ones are refused with SERVER_STOPPING."""

from __future__ import annotations

import asyncio
from typing import Any

from vflow_server.rpc.errors import server_stopping
from vflow_server.rpc.handlers import Behaviour, Context, around

_COUNTED = "/vflow.v1."


class Draining:
    """Counts the running calls of the contract's services. Must be called within the guard, which turns errors into
    statuses."""

    def __init__(self) -> None:
        self._under_way = 0
        self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()

    def around(self, method: str, handler: Any) -> Any:
        """The handler with its calls counted."""
        return around(handler, self._counted) if method.startswith(_COUNTED) else handler

    async def drain(self, grace: float) -> bool:
        """Refuse new calls (SERVER_STOPPING), and wait ``grace`` seconds at most for the running ones.

        Returns:
            Whether all have ended. Stopping the gRPC server cancels the others.
        """
        self._stopping = True
        try:
            return await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            return False

    def _counted(self, behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: Context) -> Any:
            if self._stopping:
                raise server_stopping()
            self._under_way += 1
            self._idle.clear()
            try:
                return await behaviour(request, context)
            finally:
                self._under_way -= 1
                if not self._under_way:
                    self._idle.set()

        return call
