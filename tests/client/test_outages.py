"""Outages of other kinds than a refused connection, and clients with nothing but their defaults."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

import vflow_client
from tests.client.fake_service import FakeService, Refusal

UNKNOWN_NAME, FOUND = 3, 0
IPV4 = 1


@contextmanager
def name_server(found: threading.Event) -> Iterator[int]:
    """A server of names that knows none until `found`; then all are 127.0.0.1. Yields its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            while len(query := (received := server.recvfrom(512))[0]) > 12:
                end = query.index(b"\0", 12) + 5  # after the name, the type and the class
                (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
                answers = found.is_set() and kind == IPV4
                status = FOUND if found.is_set() else UNKNOWN_NAME
                head = query[:2] + struct.pack(">5H", 0x8580 | status, 1, answers, 0, 0)
                record = b"\xc0\x0c" + struct.pack(">HHIH", IPV4, 1, 0, 4) + bytes([127, 0, 0, 1])
                server.sendto(head + query[12:end] + (record if answers else b""), received[1])

        serving = threading.Thread(target=serve)
        serving.start()
        yield server.getsockname()[1]
        server.sendto(b"", server.getsockname())  # ends it
        serving.join()


@pytest.mark.parametrize("down", [1.5, pytest.param(30.0, marks=pytest.mark.long)])
def test_a_name_that_vanishes_for_a_while(address: str, service: FakeService, down: float) -> None:
    found = threading.Event()
    with name_server(found) as port:
        target = f"dns://127.0.0.1:{port}/vflow.test:{address.rpartition(':')[2]}"
        back = threading.Timer(down, found.set)
        back.start()
        with vflow_client.connect(target) as client:
            began = time.monotonic()
            client.strategies.rollback()  # which is not repeated, but was surely not begun
            assert time.monotonic() - began >= down - 0.2
        back.join()


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
@pytest.mark.parametrize("down", [1.5, pytest.param(30.0, marks=pytest.mark.long)])
def test_a_load_balancer_without_a_service_behind_it(
    address: str, service: FakeService, down: float, code: grpc.StatusCode
) -> None:
    methods = ("CreateSession", "AddImage", "Chat", "GetSession", "ForkSession", "DeleteSession")
    with vflow_client.connect(address) as client, client.session() as session:

        def everything() -> None:
            with client.session() as other:
                other.add_image(b"picture")
                assert other.ask("How many?").read() == "two red stars"
                other.state()
                other.fork()

        session.ask("How many?").read()
        for method in methods:
            service.refusals[method] = [Refusal(code)] * 10_000
        back = threading.Timer(down, lambda: service.refusals.clear())
        back.start()
        everything()
        back.join()
    assert len({request.request_id for request in service.requests["AddImage"]}) == 1
