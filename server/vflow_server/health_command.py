"""`vflow health`: asks a running service whether it serves."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from vflow_client.channel import channel_plan
from vflow_client.commands.connection import add_tls_arguments, tls_of
from vflow_client.commands.exit_code import FAILED, exit_code_of
from vflow_client.tls import TlsSource
from vflow_server.settings import ENVIRONMENT_PREFIX, Settings

TIMEOUT = 3.0
"""Seconds that the service has for its answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on `parser`."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="address of the service (environment: VFLOW_ADDRESS, or the service's own VFLOW_HOST and VFLOW_PORT; "
        "default: this machine)",
    )
    add_tls_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the parsed `arguments`; returns the exit code: 0 if the service serves."""
    address = arguments.address or address_from(os.environ)
    return exit_code_of(lambda: _check(address, tls_of(arguments) or False), address)


def address_from(environment: Mapping[str, str]) -> str:
    """The address that the clients' variable names, or the one where a service with these variables listens."""
    if address := environment.get(f"{ENVIRONMENT_PREFIX}ADDRESS"):
        return address
    host = (environment.get(f"{ENVIRONMENT_PREFIX}HOST") or "127.0.0.1").removeprefix("[").removesuffix("]")
    host = {"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(host, host)  # what listens everywhere listens here
    port = environment.get(f"{ENVIRONMENT_PREFIX}PORT") or Settings.port
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check(address: str, tls: TlsSource) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from vflow_client.errors import error_from_call
    from vflow_client.peer import Peer

    plan = channel_plan(address, tls)
    with plan.channel() as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        except grpc.RpcError as failure:
            error = error_from_call(failure)
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                error.message = f"no answer within {TIMEOUT:g} s"
            Peer(address, encrypted=plan.credentials is not None).advise(error)
            print(f"{address}: {error.message}", file=sys.stderr)
            return FAILED
    print(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)}")
    return 0 if response.status == health_pb2.HealthCheckResponse.SERVING else FAILED
