"""A listener: one gRPC server on one port, with bounds on what callers can send and hold open."""

from __future__ import annotations

import errno
import ipaddress
import resource
import socket
from collections.abc import Sequence
from typing import Any, cast

import grpc

from vflow_server.rpc.method_table import Layer, MethodTable

FEWEST_STREAMS = 128
"""Calls at the same time that every connection may have. A client of gRPC keeps further ones back until others have
ended. In all, calls are bounded by what the layers let in: a bound of gRPC's own would count what nobody may do,
too, and refuse everybody for it."""

MOST_PENDING = 1 << 16
"""Calls that have come and that the event loop has not taken up. From a thousand on, gRPC would end some at random."""

UNREAD = 64 * 1024
"""Bytes of a call that gRPC buffers before the call is read. By default gRPC enlarges this for connections that have
brought large messages, to a megabyte and more for each call."""


def most_connections() -> int:
    """Connections that may be open: half of the descriptors that the process may have, so that the rest are its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 16 if soft == resource.RLIM_INFINITY else soft // 2


HANDSHAKE = 20
"""Seconds in which a connection must begin to speak HTTP/2, after its TLS handshake."""

MOST_METADATA = 16 * 1024
"""Bytes of a call's metadata at most. By default gRPC refuses some calls at random above half of its limit."""

LONGEST_CALL = 1800
"""Seconds that a call may last beyond the age of its connection: longer than any turn, unless its caller does not read
the answer."""


class Listener:
    """A gRPC server on one port. Made, started and stopped on one event loop.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        option: the option that sets the port, for the error message.
        credentials: credentials for TLS; None: unencrypted.
        layers: what surrounds each method, the outermost first.
        most_bytes: bytes of a message at most, sent or received.
        most_streams: calls at the same time on one connection at most, if these are more than :data:`FEWEST_STREAMS`.
        longest_idle: seconds without a call after which a connection is closed.
        longest_age: seconds after which a connection accepts no more calls, and clients open a new one.

    Attributes:
        server: takes services, as the generated functions add them, before :meth:`start`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        option: str,
        *,
        credentials: grpc.ServerCredentials | None,
        layers: Sequence[Layer],
        most_bytes: int,
        most_streams: int,
        longest_idle: float,
        longest_age: float,
    ) -> None:
        self._address = address(host, port)
        self._option = option
        self._credentials = credentials  # gRPC's core calls it, but holds no reference
        methods = MethodTable(layers)
        self.server = cast(grpc.aio.Server, methods)
        self._server = grpc.aio.server(
            handlers=[methods],
            options=[
                ("grpc.max_receive_message_length", most_bytes),
                ("grpc.max_send_message_length", most_bytes),
                ("grpc.max_metadata_size", MOST_METADATA),
                ("grpc.absolute_max_metadata_size", MOST_METADATA),
                ("grpc.max_concurrent_streams", max(most_streams, FEWEST_STREAMS)),
                ("grpc.server.max_pending_requests", MOST_PENDING),
                ("grpc.server.max_pending_requests_hard_limit", MOST_PENDING),
                ("grpc.http2.lookahead_bytes", UNREAD),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.max_allowed_incoming_connections", most_connections()),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE * 1000),
                ("grpc.max_connection_idle_ms", round(longest_idle * 1000)),
                ("grpc.max_connection_age_ms", round(longest_age * 1000)),
                ("grpc.max_connection_age_grace_ms", LONGEST_CALL * 1000),
                # Two processes on one port would share the calls but not the sessions.
                ("grpc.so_reuseport", 0),
                # Detect clients that died without closing their connection, and tolerate those that ping often.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )

    def bind(self) -> int:
        """Bind the port and return it; calls are not served yet.

        Raises:
            OSError: the address cannot be listened on.
        """
        try:
            return (
                self._server.add_insecure_port(self._address)
                if self._credentials is None
                else self._server.add_secure_port(self._address, self._credentials)
            )
        except RuntimeError as error:
            raise _cannot_listen(self._address, self._option, errno.EADDRINUSE) from error

    async def start(self) -> None:
        """Start to serve."""
        await self._server.start()

    async def ended(self) -> None:
        """Wait until it serves no more, for whatever reason."""
        await self._server.wait_for_termination()

    async def stop(self, grace: float) -> None:
        """Accept no more calls, and cancel the running ones after ``grace`` seconds."""
        await self._server.stop(grace)


def check_port(host: str, port: int, option: str) -> None:
    """Bind a port and let go of it again, long before a server that takes a while to make does so for good.

    Args:
        host: address or name to listen on.
        port: port to listen on.
        option: the setting that the port comes from, for the error.

    Raises:
        OSError: no address of ``host`` can be listened on.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        later = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        number = errno.EAGAIN if later else errno.EINVAL
        raise _cannot_listen(address(host, port), option, number) from error
    if host == "::":  # gRPC falls back to this where there is no IPv6
        addresses += socket.getaddrinfo("0.0.0.0", port, type=socket.SOCK_STREAM)
    if not any(_binds(family, each) for family, _, _, _, each in addresses):  # gRPC is content with one, too
        raise _cannot_listen(address(host, port), option, errno.EADDRINUSE)


def _binds(family: int, address: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no matter
            tried.bind(address)
    except OSError:
        return False
    return True


def _cannot_listen(address: str, option: str, number: int) -> OSError:
    return OSError(number, f"cannot listen on {address}; is the port taken? choose another with {option}")


def is_loopback(host: str) -> bool:
    """Whether ``host``, an address or a name, can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
