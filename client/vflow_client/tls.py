"""Encrypted connections: how the client verifies the service, and which certificate it presents."""

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class Tls:
    """How to encrypt a connection. All files are PEM.

    Attributes:
        ca: root certificates that verify the service; None: the public ones that gRPC includes.
        certificate: the client certificate for mutual TLS, with its intermediate certificates.
        key: the private key of `certificate`.
        server_name: the name in the service's certificate; None: that of the address.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a certificate without its key, or a key without its certificate."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together: give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """The credentials of an encrypted channel.

        Raises:
            OSError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))

    def options(self) -> tuple[tuple[str, str], ...]:
        """The options of such a channel."""
        return () if self.server_name is None else (("grpc.ssl_target_name_override", self.server_name),)


TlsSource = bool | str | Path | Tls
"""True: encrypted, by public roots; a path: by the roots in that file; False: not encrypted."""


def to_tls(source: TlsSource) -> Tls | None:
    """The `Tls` that `source` stands for; None: no encryption."""
    match source:
        case Tls():
            return source
        case bool():
            return Tls() if source else None
        case _:
            return Tls(ca=source)


def _read(file: str | Path | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()
