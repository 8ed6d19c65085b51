"""How a picture is turned: the orientation in its EXIF data or, where that says nothing, in its XMP data."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

Pixels = npt.NDArray[np.uint8]

_TIFF_NAMESPACE = re.compile(rb"xmlns:([\w.-]+)\s*=\s*[\"']http://ns\.adobe\.com/tiff/1\.0/[\"']")

_AS_STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


def of_exif(exif: Image.Exif) -> int | None:
    """The orientation 1 to 8 that EXIF data names; None if it names none."""
    value = exif.get(ExifTags.Base.Orientation)
    return int(value) if isinstance(value, int) and value in _AS_STORED else None


def of_xmp(xmp: object) -> int | None:
    """The orientation 1 to 8 that an XMP packet names, as an attribute or as an element; None if it names none."""
    if isinstance(xmp, str):
        xmp = xmp.encode(errors="replace")
    if not isinstance(xmp, bytes):
        return None
    prefix = found[1] if (found := _TIFF_NAMESPACE.search(xmp)) else b"tiff"
    value = re.search(rb"\b" + re.escape(prefix) + rb":Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\s*[\"'<]", xmp)
    return int(value[1]) if value else None


def swaps_sides(orientation: int) -> bool:
    """Whether a picture stored in this orientation is as wide, as stored, as it is high upright."""
    return orientation >= 5


def as_stored(upright: Pixels, orientation: int) -> Pixels:
    """A view of the pixels of an upright picture, [height, width, 3], in the order of a file of this orientation."""
    return _AS_STORED[orientation](upright)
