"""How a command finds its service, and how it says that it failed."""

import argparse
import os
import sys

from vflow_client.client import Client, connect
from vflow_client.errors import RetuneRunning, Unavailable, VFlowError

DONE = 0
"""Exit code of a command that did what it was asked for."""
FAILED = 1
"""Exit code of a command that the service refused, or that was interrupted."""
USAGE = 2
"""Exit code of a command that was asked for something it cannot do."""


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


def complain(text: str) -> None:
    """Tells what went wrong on the error stream."""
    print(f"error: {text}", file=sys.stderr, flush=True)


def complain_of_input(error: OSError | ValueError) -> None:
    """Tells what is wrong with what the command was given."""
    complain(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error))


def complain_of(error: VFlowError, address: str) -> None:
    """Tells on the error stream how a call to the service at `address` failed, and where it is plain what to do."""
    if isinstance(error, Unavailable):
        complain(f"no service at {address} ({error}); start one with `vflow serve`")
    elif isinstance(error, RetuneRunning) and (operation := error.metadata.get("operation")):
        complain(f"{error} (follow it with `vflow retune --follow {operation}`)")
    else:
        complain(str(error))
