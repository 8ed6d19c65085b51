"""What a person is told about the service at the other end: that calls wait for it, and why it cannot be reached."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vflow_client.errors import VFlowError

EVERY = 30.0
"""Seconds between two warnings that calls wait."""

CANNOT_CONNECT = "failed to connect to all addresses"
"""How gRPC begins its message about a call that it could not send, because no address took a connection."""

log = logging.getLogger("vflow_client")


@dataclass
class Peer:
    """The service that one client calls.

    Attributes:
        address: as the caller wrote it; None: not known.
        encrypted: whether connections to it use TLS; None: not known.
    """

    address: str | None = None
    encrypted: bool | None = None
    _warned: float = field(default=float("-inf"), init=False)

    def waiting(self, error: VFlowError, left: float) -> None:
        """Logs that a call which failed by `error` is tried again, for `left` seconds at most; not for every call."""
        now = time.monotonic()
        if now - self._warned >= EVERY:
            self._warned = now
            service = f"the service at {self.address}" if self.address else "the service"
            log.warning("waiting for %s, trying again for up to %.0f s (%s)", service, left, error)

    def advise(self, error: VFlowError) -> None:
        """Adds to the message of a connection that could not be made what may be wrong, where that can be told."""
        if error.reason is None and error.message.startswith(CANNOT_CONNECT):
            for part, advice in _ADVICE.items():
                if part in error.message and (found := advice(self.encrypted)):
                    error.message += f" ({found})"
                    return


def _closed(encrypted: bool | None) -> str | None:
    if encrypted:
        return "something listens there, but ends encrypted connections: it may ask for a client certificate"
    return "something listens there, but ends unencrypted connections: if the service uses TLS, pass tls=... or --tls"


_ADVICE: dict[str, Callable[[bool | None], str | None]] = {
    "WRONG_VERSION_NUMBER": lambda _: (
        "what listens there does not use TLS: for an unencrypted connection leave out tls=..., --tls and --ca"
    ),
    "CERTIFICATE_VERIFY_FAILED": lambda _: (
        "the service's certificate is not signed by a known authority, or not valid now: pass the authority's "
        "certificate as tls='ca.pem' or --ca"
    ),
    "Hostname Verification Check failed": lambda _: (
        "the service's certificate is for another name than that of the address: pass Tls(server_name=...) or "
        "--server-name"
    ),
    "http1.x server": lambda _: "what listens there is a web server: give the service's gRPC port",
    "Socket closed": _closed,
    "onnection reset by peer": _closed,
}
"""By a part of gRPC's message. The first that applies is given."""
