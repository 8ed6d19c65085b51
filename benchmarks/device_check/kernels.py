"""Part: the attention kernels against each other, in the shape of a 7B model."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.device_check.part import Setting
from benchmarks.device_check.peak import dtype
from benchmarks.table import Row

_COMPARISON = "benchmarks.attention"


def rows(setting: Setting) -> Iterator[Row]:
    """What the comparison of attention kernels yields on this device, the most important variants first."""
    if find_spec(_COMPARISON) is None:
        yield {"kernels": "there is one alone, so there is nothing to compare"}
        return
    attention: Any = import_module(_COMPARISON)
    geometry = attention.GEOMETRIES["tiny" if setting.rehearse else "7b"]
    scenarios = attention.scenarios(64 if setting.rehearse else 1)
    variants = attention.variants(dtype(setting), geometry, tilings=not setting.rehearse)
    if setting.rehearse:  # interpreted kernels take seconds
        scenarios, variants = scenarios[:1], variants[:1]
    yield from attention.rows(
        torch.device(setting.device),
        dtype(setting),
        geometry,
        scenarios,
        variants,
        budget_s=setting.left,
        repeats=1 if setting.rehearse else 15,
    )
