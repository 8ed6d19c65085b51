"""The side port: an HTTP server for operators. Users call gRPC, on other ports.

Uvicorn serves. This module adds the bounds that it lacks: on the time in which a request must arrive and its answer be
read, and on the number of connections. Belongs to the event loop's thread.

The import takes some tenths of a second, so the service imports this only if the side port is enabled.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus

import h11
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vflow_server.rpc.pace import Pace

MOST_BYTES = 16 * 1024
"""Bytes of a request's headers at most."""

MOST_OPEN = 64
"""Connections at the same time; further ones are closed at once."""

REQUESTS, REQUESTS_AHEAD = 20, 20
"""Requests in a second, and ahead of that pace: the pages are made on the event loop, beside the answers of users."""

PATIENCE = 10.0
"""Seconds in which a request must arrive and be answered, and again for its answer to be read."""

HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Connection", "close"),  # one request a connection
]
"""Headers of every answer."""


class SidePort:
    """Serves an ASGI application on a port.

    Args:
        app: the application; it runs on the event loop.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._pace = Pace(REQUESTS, REQUESTS_AHEAD, MOST_OPEN)
        self._config = uvicorn.Config(
            self._serve,
            interface="asgi3",
            http=_Connection,
            ws="none",
            loop="none",
            lifespan="off",
            # The application logs its own errors. Uvicorn's other log lines depend on callers, who could fill the log.
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=HEADERS,
            h11_max_incomplete_event_size=MOST_BYTES,
        )
        self._server = _Server(self._config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def serving(self) -> asyncio.Task[None]:
        """The task that serves, once it has started."""
        assert self._serving is not None, "it has not started"
        return self._serving

    async def start(self, host: str, port: int) -> int:
        """Listen and serve; returns the port.

        Raises:
            OSError: the address cannot be listened on.
        """
        try:
            listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot listen on {host}:{port} for metrics ({error.strerror}); choose another with --metrics-port",
            ) from error
        self._serving = asyncio.create_task(self._server.serve([listener]))
        number: int = listener.getsockname()[1]
        return number

    async def stop(self, grace: float = 0.0) -> None:
        """Stop listening, wait ``grace`` (whole) seconds for running requests, and close the other connections."""
        if self._serving is None:
            return
        self._config.timeout_graceful_shutdown = int(grace)
        self._server.should_exit = True
        await self._serving
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. A page that takes too long is cancelled; its connection is closed by then."""
        await self._pace.keep()
        app = self._app
        # h11 bounds only incomplete headers, so longer ones pass that arrive in one piece.
        fields = sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
        if len(scope["raw_path"]) + len(scope["query_string"]) + fields > MOST_BYTES:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            app = PlainTextResponse(_refusal(status), status)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await app(scope, receive, send)


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: the process has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    """A connection with a deadline; closed at once if there are too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(PATIENCE, transport.abort)
        if len(self.connections) > MOST_OPEN:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Give the caller time to read the answer, which is written now; then the connection closes."""
        super().on_response_complete()
        self._deadline.cancel()
        self._deadline = self.loop.call_later(PATIENCE, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not HTTP or too long, with the status that h11 suggests."""
        if self.cycle is not None:  # a request whose body is bad
            self.cycle.disconnected = True  # so that its page writes nothing more
            if self.cycle.response_started:
                self.transport.abort()
                return
        error = sys.exception()  # uvicorn calls this while it handles the error
        status = HTTPStatus(error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400)
        body = _refusal(status).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def _refusal(status: HTTPStatus) -> str:
    return f"{status.value} {status.phrase}.\n"
