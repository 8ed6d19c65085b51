"""Parts of a device check that go wrong, each in a way of its own."""

import os
import time
from collections.abc import Iterator

from benchmarks.device_check.part import Setting
from benchmarks.table import Row


def raising(setting: Setting) -> Iterator[Row]:
    """Raises behind its first row."""
    yield {"row": 1}
    raise ValueError("the kernel does not compile")


def dying(setting: Setting) -> Iterator[Row]:
    """Ends its process behind its first row."""
    yield {"row": 1}
    os._exit(7)


def hanging(setting: Setting) -> Iterator[Row]:
    """Never ends."""
    yield {"row": 1, "process": os.getpid()}
    time.sleep(3600)


def working(setting: Setting) -> Iterator[Row]:
    """Ends well."""
    yield {"row": 1, "device": setting.device, "in_time": setting.left > 0}
