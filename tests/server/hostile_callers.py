"""Callers who begin what they do not end: they speak HTTP/2 by themselves, since clients of gRPC do not allow that."""

import itertools
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from threading import Thread
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes

HEALTH_CHECK, HEALTH_WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CHAT, ADD_IMAGE = "/vflow.v1.Conversations/Chat", "/vflow.v1.Conversations/AddImage"

RESET = -1
"""The status of a call that was ended without one. gRPC so refuses what is beyond the calls of a connection."""


class HostileCaller:
    """One connection to a service.

    Args:
        address: host and port of the service.
        tenant: the tenant that its calls name.
        window: bytes of an answer that it takes, for each call; the service must keep the rest.

    Attributes:
        ended: status codes of the calls that have ended, by stream.
        messages: status messages of these.
        received: bytes of the answers, by stream.
    """

    def __init__(self, address: str, *, tenant: str | None = None, window: int | None = None) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        self._authority = address
        self._tenant = tenant
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self._h2.initiate_connection()
        if window is not None:
            self._h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.ended: dict[int, int] = {}
        self.messages: dict[int, str] = {}
        self.received: dict[int, int] = {}
        self._takes_answers = window is None
        self._flush()
        self.listen(0.2, lambda: self._h2.remote_settings.max_concurrent_streams < 2**31)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    @property
    def most_streams(self) -> int:
        """Calls that the service allows on this connection at the same time."""
        return self._h2.remote_settings.max_concurrent_streams

    @property
    def open_calls(self) -> int:
        """Calls that have not ended."""
        return self._h2.open_outbound_streams

    def call(self, method: str) -> int:
        """Begin a call, without a message; returns its stream. Waits while too many are open."""
        if self.open_calls >= self.most_streams:
            self.listen(10, lambda: self.open_calls < self.most_streams)
        stream = self._h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        if self._tenant is not None:
            headers.append(("vflow-tenant", self._tenant))
        self._h2.send_headers(stream, headers)
        self._flush()
        return stream

    def send(self, stream: int, message: bytes, *, announced: int | None = None, seconds: float = 5.0) -> int:
        """Send a message, as far as the service takes it within ``seconds``.

        Args:
            stream: the call.
            message: the message, or its beginning.
            announced: the length that is announced; None: that of ``message``.
            seconds: how long to go on.

        Returns:
            The bytes of the message that were not taken.
        """
        size = len(message) if announced is None else announced
        left = memoryview(struct.pack(">?I", False, size) + message)
        deadline = time.monotonic() + seconds
        while left and stream not in self.ended and time.monotonic() < deadline:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size, len(left))
            if not room:
                self.listen(0.05)
                continue
            self._h2.send_data(stream, bytes(left[:room]))
            left = left[room:]
            self._flush()
            self.listen(0)
        return len(left)

    def end(self, stream: int) -> None:
        """Say that no further message comes."""
        self._h2.end_stream(stream)
        self._flush()

    def listen(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Take in what the service sends, for so long or until ``until`` holds; returns whether it does."""
        deadline = time.monotonic() + seconds
        while not (done := until()):
            ready, _, _ = select.select([self._socket], [], [], max(deadline - time.monotonic(), 0))
            if not ready or not (data := self._socket.recv(1 << 16)):
                break
            for event in self._h2.receive_data(data):
                match event:
                    case ResponseReceived() | TrailersReceived():
                        headers = {str(name): str(value) for name, value in event.headers}
                        if "grpc-status" in headers:
                            self.ended[event.stream_id] = int(headers["grpc-status"])
                            self.messages[event.stream_id] = unquote(headers.get("grpc-message", ""))
                    case DataReceived():
                        size = self.received.get(event.stream_id, 0) + len(event.data)
                        self.received[event.stream_id] = size
                        if self._takes_answers:
                            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    case StreamReset() | StreamEnded():
                        self.ended.setdefault(event.stream_id, RESET)
            self._flush()
        return done or until()

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            self._socket.sendall(data)


@contextmanager
def hostile_callers(address: str, count: int, tenants: Sequence[str | None] = (None,)) -> Iterator[list[HostileCaller]]:
    """As many connections, of the tenants in turn."""
    with ExitStack() as stack:
        names = itertools.islice(itertools.cycle(tenants), count)
        yield [stack.enter_context(HostileCaller(address, tenant=name)) for name in names]


@contextmanager
def holding_back(address: str, method: str, tenants: Sequence[str], size: int) -> Iterator[None]:
    """Twelve callers, of the tenants in turn, send a method messages of ``size`` bytes and hold back the last one.

    They run in a process of their own, at the lowest priority, as if they were on another machine.
    """
    command = (sys.executable, "-m", __name__, address, method, str(size), *tenants)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def _hold_back(address: str, method: str, size: int, tenant: str) -> None:
    field = b"\x12" + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21])
    while True:
        with suppress(OSError), HostileCaller(address, tenant=tenant) as caller:
            stream = caller.call(method)
            caller.send(stream, field + bytes(size - 1), announced=len(field) + size)
            caller.listen(10, lambda: bool(caller.ended))


def main(address: str, method: str, size: str, *tenants: str) -> None:
    """Hold back until the process is killed."""
    os.nice(19)
    names = itertools.islice(itertools.cycle(tenants), 12)
    for name in names:
        Thread(target=_hold_back, args=(address, method, int(size), name)).start()
    print("holding back", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
