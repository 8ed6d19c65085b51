"""What both clients' channels to a service have in common: the target, the options and the encryption."""

from dataclasses import dataclass

import grpc

from vflow_client.address import Address, to_address
from vflow_client.tls import Tls, TlsSource, to_tls

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""Largest message that the client sends or receives. The limit is high because the service has limits of its own, whose
errors say what to do."""

Options = tuple[tuple[str, int | str], ...]

CHANNEL_OPTIONS: Options = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Routers drop idle connections, and a prefill can take long without any message: ping during calls.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A service that restarts is found again soon. By default the pauses between two tries to connect grow to two
    # minutes, and a name is looked up every 30 s at most.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # Not a pause, in spite of its name, but the time that a try to connect may take. The default, 20 s, is long where
    # packets are dropped meanwhile; a slow line with TLS needs more than a second.
    ("grpc.min_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True)
class ChannelPlan:
    """What to make a channel of.

    Attributes:
        target: the address as gRPC takes it.
        credentials: of an encrypted channel; None: not encrypted.
        options: of the channel.
    """

    target: str
    credentials: grpc.ChannelCredentials | None
    options: Options

    def channel(self) -> grpc.Channel:
        """A synchronous channel."""
        if self.credentials is None:
            return grpc.insecure_channel(self.target, options=self.options)
        return grpc.secure_channel(self.target, self.credentials, options=self.options)

    def aio_channel(self) -> grpc.aio.Channel:
        """A channel for asyncio."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, options=self.options)
        return grpc.aio.secure_channel(self.target, self.credentials, options=self.options)


def channel_plan(address: str, tls: TlsSource) -> ChannelPlan:
    """How to reach the service at `address`, encrypted as `tls` says or, if it is False, as the address says.

    Raises:
        OSError: a file of `tls` cannot be read.
        ValueError: `address` is none, or says that the connection is not encrypted while `tls` says that it is.
    """
    place, encryption = to_address(address), to_tls(tls)
    if place.encrypted is False and encryption is not None:
        raise ValueError(f"the address {address!r} asks for an unencrypted connection, tls for an encrypted one")
    if place.encrypted and encryption is None:
        encryption = Tls()
    options = (*CHANNEL_OPTIONS, *proxy_options(place))
    if encryption is None:
        return ChannelPlan(place.target, None, options)
    return ChannelPlan(place.target, encryption.credentials(), (*options, *encryption.options()))


def proxy_options(place: Address) -> Options:
    """No proxy leads back to this machine, so `http_proxy` is for other machines only; for those, gRPC heeds it."""
    return (("grpc.enable_http_proxy", 0),) if place.local else ()
