"""How a command finds its service."""

import argparse
import os

from vflow_client.client import Client, connect


def add_connection_arguments(parser: argparse.ArgumentParser, *, timeout: float, limits: str) -> None:
    """Declares where the service is and for whom it is called; `timeout` is the default of what it `limits`."""
    parser.add_argument(
        "--address",
        default=os.environ.get("VFLOW_ADDRESS", "localhost:50051"),
        help="host and port of the service (environment: VFLOW_ADDRESS; default: %(default)s)",
    )
    parser.add_argument(
        "--tenant", default=os.environ.get("VFLOW_TENANT"), help="whose calls they are (environment: VFLOW_TENANT)"
    )
    parser.add_argument(
        "--timeout", type=float, default=timeout, help=f"seconds {limits} at most (default: %(default)g)"
    )


def connected(arguments: argparse.Namespace) -> Client:
    """A client of the service that the parsed `arguments` name."""
    return connect(arguments.address, timeout=arguments.timeout, tenant=arguments.tenant)
