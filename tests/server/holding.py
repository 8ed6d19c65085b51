"""Threads of a service that are held, so that calls come in an order that is forced."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.server.served import Served
from vflow_server.access.caller import DEFAULT_TENANT


@contextmanager
def journal_held(served: Served) -> Iterator[None]:
    """Nothing is written within the block."""
    enough = threading.Event()
    assert served.service.archive is not None
    held = served.service.archive.submit(lambda connection: enough.wait(20))
    try:
        yield
    finally:
        enough.set()
        held.result(20)


@contextmanager
def engine_held(served: Served) -> Iterator[None]:
    """The engine takes no step within the block."""
    reached, enough = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        enough.wait(20)

    async def submit() -> None:
        served.service.engine.call(hold, DEFAULT_TENANT)

    served.run(submit())
    assert reached.wait(20)
    try:
        yield
    finally:
        enough.set()
