"""The parts of the check, and what each is told."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from benchmarks.table import Row


@dataclass(frozen=True)
class Setting:
    """What a part is told.

    Attributes:
        device: the torch device.
        rehearse: whether tiny shapes are run, to see that all works.
        ends: ``time.monotonic()`` at which the part should have ended; it is killed somewhat later.
    """

    device: str
    rehearse: bool
    ends: float

    @property
    def left(self) -> float:
        """Seconds until the part should have ended."""
        return self.ends - time.monotonic()


Rows = Callable[[Setting], Iterator[Row]]
"""Runs a part, and yields each row as soon as it is known."""


def last_line(failure: Exception) -> str:
    """What failed, in a line."""
    return traceback.format_exception_only(failure)[-1].strip().splitlines()[0][:300]


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: its name.
        share: its share of the time, relative to the shares of the others. What a part leaves goes to those after it.
        module: the module that has its function.
        function: the name of its :data:`Rows`.
    """

    name: str
    share: float
    module: str
    function: str = "rows"

    def load(self) -> Rows:
        """Its function. Only now its module is imported."""
        rows: Rows = getattr(import_module(self.module), self.function)
        return rows


_HERE = "benchmarks.device_check"

PARTS = (
    Part("device", 5, f"{_HERE}.peak"),
    Part("tests", 12, f"{_HERE}.cuda_tests"),
    Part("exactness", 10, f"{_HERE}.exactness"),
    Part("kernels", 6, f"{_HERE}.kernels"),
    Part("onevision-7b", 24, f"{_HERE}.shapes", "onevision"),
    Part("onevision-7b-generate", 14, f"{_HERE}.shapes", "onevision_generate"),
    Part("conversations", 12, f"{_HERE}.conversations"),
    Part("sessions", 4, f"{_HERE}.sessions"),
    Part("qwen3-vl-8b", 16, f"{_HERE}.shapes", "qwen"),
    Part("qwen3-vl-8b-generate", 10, f"{_HERE}.shapes", "qwen_generate"),
)
"""In the order in which they run: what decides most comes first."""
