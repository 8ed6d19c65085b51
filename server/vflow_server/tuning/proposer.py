"""The process that computes a search's proposals.

A proposal fits a model to the trials so far, which keeps Python busy for up to a second. In the engine's process that
would delay every step of every sequence.
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
        # Not forked: this process has threads of the model and of gRPC, which do not survive a fork.
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_give_way)

    def __call__(self, work: Callable[[], Any]) -> Future[Any]:
        """Run ``work``, which must be picklable, in the process; returns the future of its result."""
        return self._process.submit(work)

    def close(self) -> None:
        """End the process after its current work, without waiting for that. Idempotent."""
        self._process.shutdown(wait=False, cancel_futures=True)


def _give_way() -> None:
    os.nice(10)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported and reads it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit with the parent: one that is killed cannot end this process, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
