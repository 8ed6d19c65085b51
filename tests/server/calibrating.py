"""Calibration samples and a proposer for tests of searches and comparisons."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tests.server.drawing import png
from vflow_client import Sample


def samples(count: int, questions: tuple[str, ...] = ("What?", "And then?")) -> list[Sample]:
    """Different small pictures with the same questions."""
    return [Sample(png(60, 80, seed=300 + number), questions) for number in range(count)]


class NoProcess:
    """Makes proposals in this process: starting another one would be most of a test's time."""

    def __call__(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work())
        return future

    def close(self) -> None:
        pass
