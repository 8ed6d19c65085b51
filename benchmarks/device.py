"""What a device can do at best, measured: arithmetic and memory bandwidth, for bounds beside timings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_MATRIX = {"cpu": 2048, "cuda": 8192}
_COPIED_BYTES = 512 << 20
_RUNS = 5


@dataclass(frozen=True)
class DevicePeak:
    """What a device reaches on the simplest work.

    Attributes:
        flops: floating-point operations a second, of a product of two large square matrices.
        bandwidth: bytes a second, read and written, of a copy much larger than the caches.
    """

    flops: float
    bandwidth: float

    def bound_ms(self, flops: float, bytes_moved: float) -> float:
        """The least milliseconds for this many operations on this many bytes."""
        return 1e3 * max(flops / self.flops, bytes_moved / self.bandwidth)


def measure_peak(
    device: torch.device, dtype: torch.dtype, *, matrix: int | None = None, copied_bytes: int = _COPIED_BYTES
) -> DevicePeak:
    """Measure a device for numbers of a type.

    Args:
        device: the device.
        dtype: the type.
        matrix: side of the matrices that are multiplied; None: enough for the device.
        copied_bytes: how much is copied.
    """
    side = matrix or _MATRIX[device.type]
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    source = torch.ones(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return DevicePeak(
        flops=2 * side**3 / best_seconds(lambda: torch.mm(left, right), device),
        bandwidth=2 * copied_bytes / best_seconds(lambda: target.copy_(source), device),
    )


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs, after one that is not counted."""
    return min(seconds(work, device) for _ in range(_RUNS + 1))


def median_ms(work: Callable[[], object], device: torch.device, runs: int) -> float:
    """The median of ``runs`` runs, in milliseconds."""
    return 1e3 * statistics.median(seconds(work, device) for _ in range(runs))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, until the device has finished what it queued."""
    _synchronise(device)
    begun = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - begun


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
