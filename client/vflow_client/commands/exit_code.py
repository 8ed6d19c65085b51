"""What a command's end means to a shell, and how a failure is told to a person."""

import os
import sys
from collections.abc import Callable

import grpc

from vflow_client.errors import RetuneRunning, StrategyNotFound, Unauthenticated, Unavailable, VFlowError

DONE = 0
"""It did what it was asked for."""
FAILED = 1
"""The service refused or failed, or the command was interrupted."""
USAGE = 2
"""It was asked for something that it cannot do."""


def exit_code_of(command: Callable[[], int], address: str) -> int:
    """Runs a command that talks with the service at `address`; tells how it failed, if it does, on the error stream."""
    try:
        return command()
    except VFlowError as error:
        complain_of(error, address)
        return FAILED
    except BrokenPipeError:  # Whoever read the output, such as `head`, has seen enough.
        # What is left to be flushed at the interpreter's end would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return USAGE
    except ValueError as error:
        complain(str(error))
        return USAGE
    except KeyboardInterrupt:
        complain("interrupted")
        return FAILED


def complain(text: str) -> None:
    """Tells what went wrong on the error stream."""
    print(f"error: {text}", file=sys.stderr, flush=True)


def complain_of(error: VFlowError, address: str) -> None:
    """Tells on the error stream how a call to the service at `address` failed, and where it is plain what to do."""
    if isinstance(error, Unauthenticated):
        complain(f"{error} (--token, or VFLOW_TOKEN)")
    elif error.code is grpc.StatusCode.UNIMPLEMENTED:
        complain(f"{error} (the services for administrators may have a port of their own: --address)")
    elif isinstance(error, Unavailable) and error.reason is None:  # a service that is there gives its reason
        complain(
            f"no service answers at {address} ({error}); start one with `vflow serve`, or mend --address or the "
            "options of TLS"
        )
    elif isinstance(error, StrategyNotFound):
        complain(f"{error} (vflow strategies list)")
    elif isinstance(error, RetuneRunning) and (operation := error.metadata.get("operation")):
        complain(f"{error} (vflow retune --follow {operation})")
    else:
        complain(str(error))
