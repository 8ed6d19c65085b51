"""The process that makes a search's proposals: fitting a model of what was tried is Python's work for a second at a
time, and beside the engine in one process it would hold up every step of every sequence.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


class Proposer:
    """A process of low priority, which starts with the first proposal and ends with this process."""

    def __init__(self) -> None:
        # Not forked: this process has threads, of the model and of gRPC, which a fork would leave amid things.
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_give_way)

    def __call__(self, work: Callable[[], Any]) -> Future[Any]:
        """Have ``work``, which can be pickled, done there."""
        return self._process.submit(work)

    def close(self) -> None:
        """End the process once it has done what it is doing; does not wait for it. Idempotent."""
        self._process.shutdown(wait=False, cancel_futures=True)


def _give_way() -> None:
    os.nice(10)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there to read it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end this process, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
