"""A relay to the service that carries a number of bytes and then holds back the rest, with both connections open."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self


class HoldingRelay:
    """Carries what one client sends up to a number of bytes, and all that the service answers.

    Args:
        address: the service's host and port.
        most: bytes that are carried to the service.

    Attributes:
        address: host and port that the client connects to, within the block.
    """

    def __init__(self, address: str, *, most: int) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._most = most
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._carry_both, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        service_reader, service_writer = await asyncio.open_connection(self._host, self._port)
        self._tasks |= {
            asyncio.create_task(_carry(reader, service_writer, self._most)),
            asyncio.create_task(_carry(service_reader, writer, None)),
        }


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None) -> None:
    try:
        with suppress(ConnectionError):
            while left is None or left > 0:
                data = await reader.read(1 << 20 if left is None else min(left, 1 << 20))
                if not data:
                    return
                if left is not None:
                    left -= len(data)
                writer.write(data)
                await writer.drain()
            await asyncio.Event().wait()  # held back
    finally:
        writer.close()
