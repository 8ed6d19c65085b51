"""What an image processor makes of 8-bit pixels, exactly, and where the tower runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Normalisation:
    """An image processor's rescaling and normalisation of 8-bit pixels.

    A channel has 256 values, and what becomes of one depends on nothing else. So the processor itself normalises each
    value once, and pixels look theirs up: on any device the result is the processor's to the last bit, and a quarter
    of the bytes travel to the device.

    Args:
        processor: the image processor.
        device: where pixels are normalised.
    """

    def __init__(self, processor: Any, device: torch.device) -> None:
        levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=0)
        rescaled = processor.rescale(levels, scale=processor.rescale_factor)
        normalised = processor.normalize(rescaled, mean=processor.image_mean, std=processor.image_std)
        self._table = np.ascontiguousarray(normalised[..., 0], dtype=np.float32)
        self._device = device
        self._on_device = torch.from_numpy(self._table).to(device)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """From uint8 [pictures, 3, height, width] to float32 of the same shape, on the device."""
        if self._device.type == "cpu":
            # NumPy looks bytes up as they are; torch wants indices of eight bytes each.
            found = np.empty(pixels.shape, np.float32)
            for channel, table in enumerate(self._table):
                np.take(table, pixels[:, channel], out=found[:, channel], mode="clip")
            return torch.from_numpy(found)
        return look_up(self._on_device, torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device))


def look_up(table: Tensor, pixels: Tensor) -> Tensor:
    """What a table says of pixels, on the device of both.

    Args:
        table: [channels, 256].
        pixels: uint8 [pictures, channels, height, width].

    Returns:
        [pictures, channels, height, width], of the table's type.
    """
    rows = torch.arange(0, table.numel(), table.shape[1], device=table.device)
    return table.flatten()[pixels.long() + rows[:, None, None]]
