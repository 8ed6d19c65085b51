"""Part: what the device is, and what it does at best."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import transformers

from benchmarks.device import DevicePeak, measure_peak
from benchmarks.device_check.part import Setting
from benchmarks.table import Row


def dtype(setting: Setting) -> torch.dtype:
    """The number type of the shapes."""
    return torch.float32 if setting.device == "cpu" else torch.bfloat16


def peak(setting: Setting) -> DevicePeak:
    """What the device does at best, measured."""
    device = torch.device(setting.device)
    if setting.rehearse:
        return measure_peak(device, dtype(setting), matrix=256, copied_bytes=1 << 20)
    return measure_peak(device, dtype(setting))


def rows(setting: Setting) -> Iterator[Row]:
    """The device, the versions, and the bounds that everything is held against."""
    device = torch.device(setting.device)
    on_cuda = device.type == "cuda"
    yield {
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "memory_GiB": torch.cuda.mem_get_info(device)[1] / 2**30 if on_cuda else None,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if on_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }
    best = peak(setting)
    yield {"dtype": str(dtype(setting)), "TFLOP_s": best.flops / 1e12, "GB_s": best.bandwidth / 1e9}
