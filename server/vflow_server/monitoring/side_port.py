"""The side port: a few pages over HTTP for those who look after the service. Not for its users, who speak gRPC.

Small on purpose: GET and HEAD, one request a connection, bounded in bytes and time. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl

import structlog

MOST_BYTES = 16 * 1024
"""Bytes of a request at most."""

MOST_OPEN = 64
"""Connections at the same time; what is beyond is closed at once."""

PATIENCE = 10.0
"""Seconds for a request to arrive, and again for its answer to be taken."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        path: without the query.
        query: what follows the question mark, by name.
        headers: by lower-case name.
    """

    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What is sent back; nothing of it may be kept by caches.

    Attributes:
        body: its bytes.
        content_type: what they are.
        status: how it went.
        headers: further ones.
    """

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[Request], Awaitable[Answer]]


class SidePort:
    """Serves pages by their path.

    Args:
        pages: what there is; each is called on the event loop.
    """

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen and serve; returns the port.

        Raises:
            OSError: the address cannot be listened on.
        """
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=MOST_BYTES)
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}:{port} for metrics ({error.strerror}); choose another with --metrics-port"
            ) from error
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    async def stop(self) -> None:
        """Listen no more, and drop what is open."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._open):
            connection.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MOST_OPEN:
            writer.transport.abort()
            return
        connection = asyncio.create_task(self._serve(reader, writer))
        self._open.add(connection)
        connection.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(PATIENCE):
                    method, answer = await self._answer(reader)
                async with asyncio.timeout(PATIENCE):
                    writer.write(_head(answer) + (b"" if method == "HEAD" else answer.body))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[str, Answer]:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return "GET", refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        line, *rest = head.decode("latin-1").split("\r\n")
        method, _, target = line.partition(" ")
        target, _, protocol = target.rpartition(" ")
        if not protocol.startswith("HTTP/1.") or not target.startswith("/"):
            return "GET", refusal(HTTPStatus.BAD_REQUEST)
        if method not in ("GET", "HEAD"):
            return "GET", refusal(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})
        split = (header.partition(":") for header in rest if header)
        headers = {name.strip().lower(): value.strip() for name, _, value in split}
        path, _, query = target.partition("?")
        if (page := self._pages.get(path)) is None:
            return method, refusal(HTTPStatus.NOT_FOUND, told=f"There is {', '.join(sorted(self._pages))}.")
        try:
            return method, await page(Request(path, dict(parse_qsl(query)), headers))
        except Exception:
            log.exception("a page of the side port failed", path=path)
            return method, refusal(HTTPStatus.INTERNAL_SERVER_ERROR)


def refusal(status: HTTPStatus, headers: Mapping[str, str] | None = None, told: str = "") -> Answer:
    """An answer that says no."""
    return Answer(f"{status.value} {status.phrase}. {told}\n".encode(), status=status, headers=headers or {})


def _head(answer: Answer) -> bytes:
    lines = {
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        **answer.headers,
    }
    said = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n{said}\r\n".encode("latin-1")
