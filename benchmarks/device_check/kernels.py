"""Part: the attention kernels against each other, where this version of the project has several."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

from benchmarks.device_check.part import Setting
from benchmarks.table import Row

_COMPARISON = "benchmarks.attention_kernels"


def rows(setting: Setting) -> Iterator[Row]:
    """What the comparison of attention kernels yields on this device."""
    if find_spec(_COMPARISON) is None:
        yield {"kernels": "there is one alone, so there is nothing to compare"}
        return
    if setting.device == "cpu":
        yield {"kernels": "they need a CUDA device"}
        return
    yield from import_module(_COMPARISON).compare(setting.device, setting.left)
