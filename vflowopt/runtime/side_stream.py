"""A stream of its own on a CUDA device: one thread's work runs beside another's, and not behind it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from vflowopt.compression.pipeline import CompressedImage, EncodedImage


class SideStream:
    """Within it, what the thread queues on the device runs beside what other threads queue on the default stream.

    It ends once the device has done what was queued within, so that any stream may read the results. A stream is
    waited for, never the device: another thread may be capturing a graph, and to wait for that would break it.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._default = torch.cuda.default_stream(device)
        self._within = torch.cuda.stream(self._stream)

    @classmethod
    def on(cls, device: torch.device) -> SideStream | None:
        """A stream of a CUDA device; None on other devices, which have none."""
        return cls(device) if device.type == "cuda" else None

    def __enter__(self) -> Self:
        self._within.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._stream.synchronize()
        finally:
            self._within.__exit__(kind, failure, traceback)

    def hand_over(self, image: EncodedImage | CompressedImage) -> None:
        """Let the default stream read an image that was made within.

        When its tensors are freed, their memory goes back to this stream, where the next work would write to it at
        once. So it has to be known that the default stream may still be reading.
        """
        for value in vars(image).values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(self._default)
