"""How a command finds its service, and says who calls."""

import argparse
import os

from vflow_client.client import Client, connect
from vflow_client.tls import Tls


def add_connection_arguments(parser: argparse.ArgumentParser, *, timeout: float, limits: str) -> None:
    """Declares where the service is and for whom it is called; `timeout` is the default of what it `limits`."""
    parser.add_argument(
        "--address",
        default=os.environ.get("VFLOW_ADDRESS", "localhost:50051"),
        help="host and port of the service (environment: VFLOW_ADDRESS; default: %(default)s)",
    )
    parser.add_argument(
        "--token",
        default=os.environ.get("VFLOW_TOKEN"),
        help="says whose calls they are, where the service asks; others can see it among the arguments of a process, "
        "but not in its environment (VFLOW_TOKEN)",
    )
    parser.add_argument(
        "--tenant", default=os.environ.get("VFLOW_TENANT"), help="whose calls they are (environment: VFLOW_TENANT)"
    )
    add_tls_arguments(parser)
    parser.add_argument(
        "--timeout", type=_seconds, default=timeout, help=f"seconds {limits} at most (default: %(default)g)"
    )


def _seconds(text: str) -> float:
    """Reads a time that can pass."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return number


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares whether, and how, the connection is encrypted."""
    parser.add_argument("--tls", action="store_true", help="encrypt the connection; implied by the options of TLS")
    for option, variable, value, told in (
        ("--ca", "VFLOW_CA", "FILE", "roots of the service's certificate, PEM; without them it must be a public one"),
        ("--cert", "VFLOW_CERT", "FILE", "certificate to show a service that asks for one, PEM"),
        ("--key", "VFLOW_KEY", "FILE", "its private key, PEM"),
        ("--server-name", "VFLOW_SERVER_NAME", "NAME", "name that it must bear, if not that of the address"),
    ):
        parser.add_argument(
            option, metavar=value, default=os.environ.get(variable), help=f"{told} (environment: {variable})"
        )


def tls_of(arguments: argparse.Namespace) -> Tls | None:
    """How the parsed `arguments` have the connection encrypted; None: not at all.

    Raises:
        ValueError: a certificate without its key, or a key without its certificate.
    """
    tls = Tls(arguments.ca, arguments.cert, arguments.key, arguments.server_name)
    return tls if arguments.tls or tls != Tls() else None


def connected(arguments: argparse.Namespace) -> Client:
    """A client of the service that the parsed `arguments` name.

    Raises:
        OSError: a file of TLS cannot be read.
        ValueError: the options of TLS contradict each other.
    """
    return connect(
        arguments.address,
        timeout=arguments.timeout,
        token=arguments.token,
        tls=tls_of(arguments) or False,
        tenant=arguments.tenant,
    )
