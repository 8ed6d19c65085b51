"""The colour profile embedded in a file, as a conversion to sRGB."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, features

_MOST_BYTES = 8 << 20
"""Bytes of a profile at most. Larger ones are ignored; the largest in use, for printing presses, have about 3 MB."""

# The modes that a profile of each colour space describes.
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}

_SAME = 2
"""A profile that changes no colour by more than this many of 256 levels is taken for sRGB itself, and costs nothing."""


def conversion(profile: object, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of pixels of ``mode`` (L, RGB, CMYK or LAB) to RGB in sRGB that a file asks for.

    None if there is nothing to convert, and if the profile is broken or is not one of such pixels: viewers show such a
    picture as if it had no profile.

    Args:
        profile: the bytes of the ICC profile, if the file has one.
        mode: mode of the pixels, without alpha.
    """
    if mode != "LAB" and not isinstance(profile, bytes):
        return None
    if not features.check("littlecms2"):
        return None
    if mode == "LAB":
        return _transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")
    if not isinstance(profile, bytes) or not 128 <= len(profile) <= _MOST_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if _MODES.get(source.profile.xcolor_space) != mode:
            return None
        transform = _transform(source, mode)
        return None if _changes_nothing(transform, mode) else transform
    except MemoryError:
        raise
    except Exception:  # lcms and Pillow raise many types
        return None


def _transform(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    # Relative to white, and otherwise as measured: other intents move colours by rules of the program's own.
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the colours of a lattice come out of the conversion as they were."""
    if mode == "CMYK":
        return False
    colours: npt.NDArray[np.uint8]
    if mode == "L":
        colours = np.arange(256, dtype=np.uint8).reshape(16, 16)
    else:
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    sample = Image.fromarray(colours)
    converted = np.asarray(transform.apply(sample), dtype=np.int16)
    return bool(np.abs(converted - np.asarray(sample.convert("RGB"), dtype=np.int16)).max() <= _SAME)
