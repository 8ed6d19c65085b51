"""Arguments for the address of the service, the caller and TLS."""

import argparse
import os
import re

from vflow_client.client import Client, connect
from vflow_client.tls import Tls

_LONGEST = 30 * 24 * 3600.0
"""Seconds of a timeout at most: beyond it, gRPC's clock would overflow some day."""


def add_connection_arguments(parser: argparse.ArgumentParser, *, timeout: float, limits: str) -> None:
    """Declares address, caller and timeout; `timeout` is the default in seconds, `limits` says what it limits."""
    connection = parser.add_argument_group("connection")
    connection.add_argument(
        "--address",
        default=os.environ.get("VFLOW_ADDRESS") or "localhost:50051",
        help="host and port of the service (environment: VFLOW_ADDRESS; default: %(default)s)",
    )
    connection.add_argument(
        "--token",
        default=os.environ.get("VFLOW_TOKEN") or None,
        help="token of the caller, where the service requires one; prefer the environment (VFLOW_TOKEN), because other "
        "users can see the arguments of a process",
    )
    connection.add_argument(
        "--tenant",
        default=os.environ.get("VFLOW_TENANT") or None,
        help="tenant of the calls (environment: VFLOW_TENANT)",
    )
    connection.add_argument(
        "--timeout", type=seconds, default=timeout, help=f"time limit {limits}, in seconds (default: %(default)g)"
    )
    add_tls_arguments(parser)


def seconds(text: str) -> float:
    """For `type=` of an argument: parses a time above 0, in seconds (`90`) or as it is printed (`1 min 30 s`)."""
    parts = re.fullmatch(
        r"\s*(?:([0-9.]+) ?h)?\s*(?:([0-9.]+) ?min)?\s*(?:([0-9.]+(?:e[+-]?[0-9]+)?) ?s?)?\s*", text, re.IGNORECASE
    )
    try:
        hours, minutes, rest = (float(part or 0) for part in parts.groups()) if parts else (0.0, 0.0, 0.0)
    except ValueError:
        hours = minutes = rest = 0.0
    number = 3600 * hours + 60 * minutes + rest
    if not 0 < number <= _LONGEST:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, such as 90, or 1min 30s, got {text!r}")
    return number


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of TLS."""
    tls = parser.add_argument_group("TLS")
    tls.add_argument("--tls", action="store_true", help="encrypt the connection; implied by the other options of TLS")
    for option, variable, value, help_text in (
        ("--ca", "VFLOW_CA", "FILE", "root certificates that verify the service, PEM; default: public ones"),
        ("--cert", "VFLOW_CERT", "FILE", "client certificate for mutual TLS, PEM"),
        ("--key", "VFLOW_KEY", "FILE", "private key of the client certificate, PEM"),
        (
            "--server-name",
            "VFLOW_SERVER_NAME",
            "NAME",
            "name in the certificate of the service; default: that of the address",
        ),
    ):
        tls.add_argument(
            option,
            metavar=value,
            default=os.environ.get(variable) or None,
            help=f"{help_text} (environment: {variable})",
        )


def tls_of(arguments: argparse.Namespace) -> Tls | None:
    """The encryption that the parsed `arguments` ask for; None: none.

    Raises:
        ValueError: a certificate without its key, or a key without its certificate.
    """
    tls = Tls(arguments.ca, arguments.cert, arguments.key, arguments.server_name)
    return tls if arguments.tls or tls != Tls() else None


def connected(arguments: argparse.Namespace) -> Client:
    """A client of the service that the parsed `arguments` name.

    Raises:
        OSError: a file for TLS cannot be read.
        ValueError: the address is none, the token cannot be sent, or the options of TLS contradict each other.
    """
    return connect(
        arguments.address,
        timeout=arguments.timeout,
        token=arguments.token,
        tls=tls_of(arguments) or False,
        tenant=arguments.tenant,
    )
