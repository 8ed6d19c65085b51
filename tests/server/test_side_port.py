"""The side port: what it answers to requests it cannot serve, and how long it bears with slow callers."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from tests.server.conftest import Serve
from tests.server.served import Served
from vflow_server.monitoring import side_port
from vflow_server.monitoring.side_port import SidePort

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
BAD_BODY = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n"


@pytest.fixture
def watched(serve: Serve) -> Served:
    return serve(metrics_port="0")


def connected(port: int | None) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port or 0), timeout=20)


def received(connection: socket.socket) -> bytes:
    """What comes until the other side closes, or aborts."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def spoken(port: int | None, request: bytes) -> bytes:
    with connected(port) as connection:
        connection.sendall(request)
        return received(connection)


def test_a_port_that_is_taken_is_said_to_be(watched: Served, serve: Serve) -> None:
    with pytest.raises(OSError, match=r"cannot listen on 127.0.0.1:\d+ for metrics.*--metrics-port"):
        serve(metrics_port=str(watched.service.side_port))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /none HTTP/1.1\r\nHost: a\r\n\r\n", b"404 Not Found"),
        (b"GET /metrics/ HTTP/1.1\r\nHost: a\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\nHost: a\r\n\r\n", b"405 Method Not Allowed"),
        (b"POST /none HTTP/1.1\r\nHost: a\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET http://elsewhere/ HTTP/1.1\r\nHost: a\r\n\r\n", b"400 Bad Request"),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", b"400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400 Bad Request"),
        (b"nonsense\r\n\r\n", b"400 Bad Request"),
        (b"\xff\x00 /\r\n\r\n", b"400 Bad Request"),
        (BAD_BODY, b"400 Bad Request"),
        (
            b"GET /metrics HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 20_000 + b"\r\n\r\n",
            b"431 Request Header Fields Too Large",
        ),
    ],
)
def test_it_answers_what_it_cannot_serve(watched: Served, request_: bytes, status: bytes) -> None:
    head, _, body = spoken(watched.service.side_port, request_).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n") and body.startswith(status + b".")
    headers = head.lower()
    assert b"cache-control: no-store" in headers and b"x-content-type-options: nosniff" in headers
    allowed = [set(line[7:].split(b", ")) for line in headers.splitlines() if line.startswith(b"allow: ")]
    assert allowed == ([{b"get", b"head"}] if status.startswith(b"405") else [])
    assert spoken(watched.service.side_port, GET.replace(b"/", b"/metrics", 1)).startswith(b"HTTP/1.1 200 OK\r\n")


def test_what_is_there_is_said_where_nothing_is(watched: Served) -> None:
    assert b"There is /metrics." in spoken(watched.service.side_port, GET)


def test_a_head_has_no_body_and_a_caller_that_leaves_harms_nobody(watched: Served) -> None:
    answer = spoken(watched.service.side_port, b"HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK") and b"connection: close" in head.lower() and not body
    connected(watched.service.side_port).close()
    assert watched.client.strategies.get("full").built_in


def test_a_connection_serves_one_request(watched: Served) -> None:
    asked = GET.replace(b"/", b"/metrics", 1)
    assert spoken(watched.service.side_port, asked + asked).count(b"HTTP/1.1 200 OK") == 1


class Running:
    """A side port with the pages of a test, on an event loop of its own, of the kind that the process uses."""

    def __init__(self, *routes: Route) -> None:
        self._side_port = SidePort(Starlette(routes=routes))
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._side_port.start("127.0.0.1", 0), self._loop).result(20)

    def stop(self, grace: float = 0.0) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._side_port.stop(grace), self._loop).result(20)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


Run = Callable[..., Running]


@pytest.fixture
def run() -> Iterator[Run]:
    started: list[Running] = []

    def start(*routes: Route) -> Running:
        started.append(Running(*routes))
        return started[-1]

    yield start
    for running in started:
        running.stop()


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost:"], ids=["nothing", "half a request"])
def test_a_request_that_does_not_arrive_is_not_waited_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(side_port, "PATIENCE", 0.2)
    assert spoken(run(Route("/", hello)).port, begun) == b""


def test_an_answer_that_is_not_read_is_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_port, "PATIENCE", 0.2)
    lost = threading.Event()
    monkeypatch.setattr(side_port._Connection, "connection_lost", _then(side_port._Connection.connection_lost, lost))
    size = 64 << 20  # more than sockets hold

    async def long(request: Request) -> Response:
        return PlainTextResponse(b"." * size)

    with connected(run(Route("/", long)).port) as connection:
        connection.sendall(GET)
        assert lost.wait(20)
        assert len(received(connection)) < size


def _then(method: Callable[..., None], event: threading.Event) -> Callable[..., None]:
    def called(*args: object) -> None:
        method(*args)
        event.set()

    return called


def test_a_page_that_takes_too_long_is_cancelled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_port, "PATIENCE", 0.2)
    ended = threading.Event()

    async def stuck(request: Request) -> Response:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    assert spoken(run(Route("/", stuck)).port, GET) == b""
    assert ended.wait(20)


def test_connections_beyond_a_number_are_closed_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_port, "MOST_OPEN", 3)
    port = run(Route("/", hello)).port
    held = [connected(port) for _ in range(3)]
    assert spoken(port, b"") == b""
    for connection in held:
        connection.sendall(GET)
        assert received(connection).endswith(b"hello")
        connection.close()
    assert spoken(port, GET).endswith(b"hello")


def test_a_page_under_way_is_finished_when_it_stops_and_what_is_idle_is_dropped(run: Run) -> None:
    begun, finish = threading.Event(), threading.Event()

    async def slow(request: Request) -> Response:
        begun.set()
        await asyncio.to_thread(finish.wait)
        return PlainTextResponse("done")

    running = run(Route("/", slow))
    with connected(running.port) as asking, connected(running.port) as idle:
        asking.sendall(GET)
        assert begun.wait(20)
        stopping = threading.Thread(target=running.stop, args=(20.0,))
        stopping.start()
        assert received(idle) == b""
        finish.set()
        assert received(asking).endswith(b"done")
        stopping.join()
    with pytest.raises(ConnectionRefusedError):
        connected(running.port)


def test_nobody_waits_for_an_idle_caller_when_it_stops_without_time_left(run: Run) -> None:
    async def stuck(request: Request) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    running = run(Route("/", stuck))
    with connected(running.port) as connection:
        connection.sendall(GET)
        running.stop()
        received(connection)


def test_signals_stay_with_the_process() -> None:
    """In the main thread, where uvicorn would take them."""

    async def lived() -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        serving = SidePort(Starlette(routes=[Route("/", hello)]))
        port = await serving.start("127.0.0.1", 0)
        answer = await asyncio.to_thread(spoken, port, GET)
        meanwhile = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        await serving.stop()
        assert answer.endswith(b"hello") and meanwhile == before

    uvloop.run(lived())


def test_a_page_that_fails_is_logged_once_and_callers_cannot_fill_the_log(
    watched: Served,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise RuntimeError("no figures")

    monkeypatch.setattr(watched.service.metrics.registry, "collect", fail)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        answer = spoken(watched.service.side_port, GET.replace(b"/", b"/metrics", 1))
        for request in (
            b"nonsense\r\n\r\n",
            GET.replace(b"\r\n\r\n", b"\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
            BAD_BODY,
        ):
            spoken(watched.service.side_port, request)
    assert answer.startswith(b"HTTP/1.1 500 Internal Server Error\r\n") and b"figures" not in answer
    logged = "".join(capfd.readouterr())
    assert logged.count("a page of the side port failed") == 1
    assert not caplog.records and "Invalid HTTP" not in logged and "upgrade" not in logged
