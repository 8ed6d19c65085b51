"""A conversation with one of several replicas that gRPC's own ring_hash policy chooses, without a proxy.

    python deploy/sticky/ring_hash.py 10.0.0.1:50051,10.0.0.2:50051 order-66 picture.png "How many circles are there?"

Every call carries `vflow-affinity`, whose hash says on a ring of the replicas' addresses which of them it goes to. So
they must be addresses that stay: where a replica comes back under another one, choose it by name (by_name.py).
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

import vflow_client
from vflow_client.channel import CHANNEL_OPTIONS

AFFINITY = "vflow-affinity"
POLICY = {"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": AFFINITY}}]}


def ring(addresses: Sequence[str], tls: vflow_client.Tls | None = None) -> grpc.Channel:
    """A channel to all of `addresses` (IP:port, in the same order or another, the same for all callers).

    With `tls`, its `server_name` is needed: an address alone is no name for a certificate to bear.
    """
    # C-core ignores the header otherwise, and every call fails with "hash attribute not present".
    os.environ["GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"] = "true"
    target = "ipv4:" + ",".join(addresses)
    options = (*CHANNEL_OPTIONS, ("grpc.service_config", json.dumps(POLICY)))
    if tls is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, tls.credentials(), (*options, *tls.options()))


@dataclass(frozen=True)
class _Call(grpc.ClientCallDetails):
    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class Affine(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]  # generic in the stubs only
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Adds the affinity of one conversation to its calls."""

    def __init__(self, key: str) -> None:
        """Takes any text of ASCII; keep it where the session's name is kept."""
        self._key = key

    def intercept_unary_unary(self, continuation: Callable[..., Any], call: Any, request: Any) -> Any:
        """Adds it to a call with one response."""
        return continuation(self._keyed(call), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], call: Any, request: Any) -> Any:
        """Adds it to a call with a stream of responses."""
        return continuation(self._keyed(call), request)

    def _keyed(self, call: Any) -> _Call:
        metadata = (*(call.metadata or ()), (AFFINITY, self._key))
        return _Call(call.method, call.timeout, metadata, call.credentials, call.wait_for_ready, call.compression)


def main(addresses: str, key: str, picture: str, question: str) -> None:
    """Shows a picture, asks about it, and asks on."""
    # One channel serves all conversations of a process; only what is put around it is of one.
    with ring(addresses.split(",")) as channel:
        client = vflow_client.Client(grpc.intercept_channel(channel, Affine(key)), token=os.environ.get("VFLOW_TOKEN"))
        with client.session() as session:
            print(session.ask(Path(picture), question).read())
            print(session.ask("What else can be seen?").read())


if __name__ == "__main__":
    main(*sys.argv[1:])
