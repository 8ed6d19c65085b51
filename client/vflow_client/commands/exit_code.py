"""Exit codes of commands, and the messages of failures."""

import os
import sys
from collections.abc import Callable

import grpc

from vflow_client.commands.waits import waits_shown
from vflow_client.errors import RetuneRunning, StrategyNotFound, Unauthenticated, Unavailable, VFlowError

DONE = 0
"""The command succeeded."""
FAILED = 1
"""The service refused or failed, or the command was interrupted."""
USAGE = 2
"""The arguments or files cannot be used."""


def exit_code_of(command: Callable[[], int], address: str) -> int:
    """Runs a command that calls the service at `address`; prints why it failed, if it did, on the error stream."""
    try:
        with waits_shown():
            return command()
    except VFlowError as error:
        print_call_error(error, address)
        return FAILED
    except BrokenPipeError:  # The reader of the output, such as `head`, has closed it.
        # Flushing the rest when the interpreter exits would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return USAGE
    except ValueError as error:
        print_error(str(error))
        return USAGE
    except KeyboardInterrupt:
        print_error("interrupted")
        return FAILED


def print_error(text: str) -> None:
    """Prints an error on the error stream."""
    print(f"error: {text}", file=sys.stderr, flush=True)


def print_call_error(error: VFlowError, address: str) -> None:
    """Prints why a call to the service at `address` failed and, where it is clear, what to do about it."""
    if isinstance(error, Unauthenticated):
        print_error(f"{error} (--token, or VFLOW_TOKEN)")
    elif error.code is grpc.StatusCode.UNIMPLEMENTED:
        print_error(f"{error} (the services for administrators may have a port of their own: --address)")
    elif isinstance(error, Unavailable) and error.reason is None:  # a service that can be reached gives a reason
        print_error(
            f"no service answers at {address} ({error}); start one with `vflow serve`, or correct --address or "
            "the options of TLS"
        )
    elif isinstance(error, StrategyNotFound):
        print_error(f"{error} (vflow strategies list)")
    elif isinstance(error, RetuneRunning) and (operation := error.metadata.get("operation")):
        print_error(f"{error} (vflow retune --follow {operation})")
    else:
        print_error(str(error))
