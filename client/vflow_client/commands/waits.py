"""Says on the error stream that a command waits for the service."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vflow_client.peer import log


@contextmanager
def waits_shown() -> Iterator[None]:
    """Shows within the block what the client logs while it waits: a person at a terminal should not wonder."""
    handler = logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
