"""A decoded frame becomes a picture: upright 8-bit RGB in sRGB, transparency flattened on white.

This works in strips of rows, so that beside the frame and the picture little memory is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from vflowopt.media import orientation
from vflowopt.media.colour_profile import conversion
from vflowopt.media.frame import Frame
from vflowopt.media.greys import Range

_PIXELS_OF_STRIP = 1 << 17

_STRAIGHT = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}
"""Modes that become others first: alpha is taken out of the colours, palettes are looked up."""

_WITHOUT_ALPHA = {"LA": "L", "RGBA": "RGB", "1": "L", "RGBX": "RGB", "P": "RGB", "YCbCr": "RGB", "HSV": "RGB"}


def to_rgb(frame: Frame) -> npt.NDArray[np.uint8]:
    """The picture of a frame, uint8 [height, width, 3].

    Raises ValueError if the mode of the frame has no way to RGB.
    """
    width, height = frame.canvas
    upright = (width, height) if orientation.swaps_sides(frame.orientation) else (height, width)
    covered = frame.image.size == frame.canvas
    pixels = np.empty((*upright, 3), np.uint8) if covered else np.full((*upright, 3), 255, np.uint8)
    left, top = frame.place
    area = orientation.as_stored(pixels, frame.orientation)[top:, left : left + frame.image.width]
    strips = _Strips(frame)
    for first, last in strips.rows():
        area[first:last] = strips.rgb(first, last)
    return pixels


class _Strips:
    """The rows of one frame in RGB."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._image = frame.image
        self._range = None
        if (greys := frame.greys) is not None:
            samples = (greys.samples(np.asarray(self._strip(*rows))) for rows in self.rows())
            self._range = Range.of(greys, samples)
        elif self._image.mode in ("I", "F") or self._image.mode.startswith("I;16"):
            raise ValueError(f"nothing says how its {self._image.mode} samples are stored")
        mode = self._image.mode
        mode = "L" if self._range is not None else _STRAIGHT.get(mode, mode)
        self._conversion = conversion(frame.profile, _WITHOUT_ALPHA.get(mode, mode))

    def rows(self) -> Iterator[tuple[int, int]]:
        """The first row of each strip, and the one behind its last."""
        step = max(1, _PIXELS_OF_STRIP // self._image.width)
        for first in range(0, self._image.height, step):
            yield first, min(first + step, self._image.height)

    def rgb(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        """These rows, uint8 [rows, width, 3]."""
        strip = self._strip(first, last)
        mask = self._transparent(strip, first, last)
        if self._range is not None and self._frame.greys is not None:
            strip = Image.fromarray(self._range.to_eight_bits(self._frame.greys.samples(np.asarray(strip))))
        pixels = np.asarray(self._flat(strip))
        if mask is not None:
            pixels = np.where(mask[:, :, None], np.uint8(255), pixels)
        return pixels

    def _strip(self, first: int, last: int) -> Image.Image:
        return self._image.crop((0, first, self._image.width, last))

    def _flat(self, strip: Image.Image) -> Image.Image:
        """A strip of 8-bit samples in RGB, on white."""
        looked_up = "RGBA" if strip.mode == "P" and strip.has_transparency_data else strip.mode
        strip = _converted(strip, _STRAIGHT.get(strip.mode, looked_up))
        colours = self._in_srgb(_converted(strip, _WITHOUT_ALPHA.get(strip.mode, strip.mode)))
        if strip.mode not in ("LA", "RGBA"):
            return colours
        flat = Image.new("RGB", strip.size, "white")
        flat.paste(colours, mask=strip.getchannel("A"))
        return flat

    def _in_srgb(self, strip: Image.Image) -> Image.Image:
        return _converted(strip, "RGB") if self._conversion is None else self._conversion.apply(strip)

    def _transparent(self, strip: Image.Image, first: int, last: int) -> npt.NDArray[np.bool_] | None:
        """Where a strip has the transparent colour, [rows, width]."""
        colour = self._frame.transparent
        if colour is None:
            return None
        samples = np.asarray(strip.convert("L") if strip.mode == "1" else strip)
        if self._frame.low_bytes is not None:
            low = self._frame.low_bytes.crop((0, first, strip.width, last))
            samples = samples.astype(np.uint16) << 8 | np.asarray(low)
        equal = np.atleast_3d(samples) == np.array(colour)
        return np.asarray(equal.all(axis=-1))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode; Pillow would copy an image that has it already."""
    return image if image.mode == mode else image.convert(mode)
