"""Resizing a large picture, which takes longer than everything else that is done to it, in pieces of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension, SizeDict

from vflowopt.compression.pieces import Pieces

T = TypeVar("T")

LARGE_PIXELS = 4_000_000
"""Pixels of a picture that is resized in a piece of its own at least."""


def _resized(pixels: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """What the backend makes of a picture, without its copies of the whole picture: uint8 [height, width, 3]."""
    height, width = size
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), resample))


class _NotResizedYet(Exception):
    """What a processor asks for is to be resized first, in a piece of its own."""

    def __init__(self, resize: Callable[[], np.ndarray]) -> None:
        super().__init__()
        self.resize = resize


@dataclass
class _Progress:
    """How far a processor's work in pieces has come.

    Attributes:
        resized: large pictures that were resized, in the order in which they are asked for; None: the work is not in
            pieces.
        asked: how many of them were asked for.
    """

    resized: list[np.ndarray] | None = None
    asked: int = 0


class _ForLarge(PilBackend):
    """Stands between an image processor and the backend that resizes for it."""

    # Of the class that is made for a processor: whatever the processor itself holds is taken for its configuration.
    progress: _Progress

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: Any = None, reducing_gap: int | None = None, **options: Any
    ) -> np.ndarray:
        to = _height_and_width(image, size)
        large = image.ndim == 3 and len(image) == 3 and image.dtype == np.uint8 and image[0].size >= LARGE_PIXELS
        if not large or to is None or not isinstance(resample, int) or reducing_gap is not None:
            resized: np.ndarray = super().resize(image, size, resample, reducing_gap, **options)
            return resized
        resize = partial(_resized, image.transpose(1, 2, 0), to, resample)
        progress = self.progress
        if progress.resized is None:
            return resize().transpose(2, 0, 1)
        if progress.asked == len(progress.resized):
            raise _NotResizedYet(resize)
        progress.asked += 1
        return progress.resized[progress.asked - 1].transpose(2, 0, 1)


def _height_and_width(image: np.ndarray, size: SizeDict) -> tuple[int, int] | None:
    """What ``size`` means for an image [3, height, width]; None if it means more than is understood here."""
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge and not size.longest_edge:
        height, width = get_resize_output_image_size(
            image, size=size.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
        )
        return height, width
    return None


def for_large(processor: Any) -> Any:
    """An image processor that copies large pictures less, and resizes them in pieces within :func:`in_pieces`.

    Its results are the same. A processor of another backend than Pillow's is returned as it is.
    """
    if not isinstance(processor, PilBackend) or isinstance(processor, _ForLarge):
        return processor
    own, made = type(processor), copy.copy(processor)
    # Between its own class and the backend, so that whatever the former does to the size is done first.
    made.__class__ = type(own.__name__, (own, _ForLarge), {"__module__": own.__module__, "progress": _Progress()})
    return made


def in_pieces(processor: Any, work: Callable[[], T]) -> Pieces[T]:
    """Work that calls a processor of :func:`for_large`; each time that it resizes a large picture is a piece.

    The work is begun anew after each of them, so it must do little before it resizes, and the same every time.

    Args:
        processor: the processor.
        work: calls it.

    Returns:
        The result of ``work``. Raises what it raises.
    """
    if not isinstance(processor, _ForLarge):
        return work()
    progress = processor.progress
    done: list[np.ndarray] = []
    while True:
        progress.resized, progress.asked = done, 0
        try:
            return work()
        except _NotResizedYet as missing:
            resize = missing.resize
        finally:
            progress.resized = None
        done.append(resize())
        yield
