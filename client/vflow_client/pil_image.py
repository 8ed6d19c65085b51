"""A PIL image as the bytes of a picture file."""

import io
from pathlib import Path
from typing import Any

_READ_BY_THE_SERVICE = {"PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF"}

_LARGE = 16 << 20
"""Bytes from which a file is worth encoding anew, in case that makes it smaller."""

_AS_PNG = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
_AS_TIFF = {"I", "F", "CMYK", "LAB"}
_WITHOUT_LOSS = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}
"""Modes that neither format holds, and those that hold the same colours. All others lose nothing in RGB."""

# What decides about the colours of an image besides its pixels.
_COLOUR_INFO = ("icc_profile", "transparency", "xmp")


def to_file(picture: Any) -> bytes:
    """The file that a PIL image was opened from, if the image was not changed since; else the image, encoded anew.

    Nothing is lost, so that the service reads what it would read from a file. What a mode does not tell, for example
    which value of a 12-bit grey is white, the service can read from the file alone.
    """
    own = _own_file(picture)
    if own is not None and len(own) <= _LARGE:
        return own
    encoded = _encoded(picture)
    return own if own is not None and len(own) < len(encoded) else encoded


def _own_file(picture: Any) -> bytes | None:
    """The bytes of the file of an image; None if there is no such file (any more), or if it shows something else."""
    from PIL import Image, ImageFile

    if (
        not isinstance(picture, ImageFile.ImageFile)
        or picture.format not in _READ_BY_THE_SERVICE
        or picture.tell() != 0
    ):
        return None
    form = "JPEG" if picture.format == "MPO" else str(picture.format)
    try:
        data = Path(str(picture.filename)).read_bytes()
        untouched = bool(picture.tile)  # nothing was decoded yet, so nothing was painted on it
        with Image.open(io.BytesIO(data), formats=[form]) as stored:
            same = _said(stored) == _said(picture) and (untouched or _shown(stored) == _shown(picture))
        return data if same else None
    except Exception:  # removed, replaced or no path at all; Pillow's readers raise exceptions of many types
        return None


def _said(picture: Any) -> tuple[object, ...]:
    """What decides how the pixels of an image look."""
    return picture.mode, picture.size, _orientation(picture), *(picture.info.get(name) for name in _COLOUR_INFO)


def _shown(picture: Any) -> tuple[object, ...]:
    """The pixels of an image, and its palette."""
    picture.load()
    return picture.getpalette("RGBA") if picture.mode in ("P", "PA") else None, picture.tobytes()


def _orientation(picture: Any) -> object:
    try:
        return picture.getexif().get(0x0112)
    except Exception:  # a picture with broken metadata is still a picture
        return None


def _encoded(picture: Any) -> bytes:
    """An image, turned upright (Pillow's PNG would lose its orientation), as PNG or TIFF."""
    from PIL import ImageOps, features

    try:
        upright = ImageOps.exif_transpose(picture)
    except SyntaxError:  # broken metadata
        upright = picture.copy()
    if upright.mode in ("I;16B", "I;16L", "I;16N"):
        upright = upright.convert("I").convert("I;16")  # at once, Pillow would go by way of 8 bits
    elif upright.mode not in _AS_PNG | _AS_TIFF:
        upright = upright.convert(_WITHOUT_LOSS.get(upright.mode, "RGB"))
    buffer = io.BytesIO()
    if upright.mode in _AS_TIFF:
        upright.save(buffer, format="TIFF", compression="tiff_adobe_deflate" if features.check("libtiff") else None)
    else:
        if (colour := _transparent_colour(upright)) is not None:
            upright.info["transparency"] = colour
        # Level 1: the bytes are sent only once, and the default level takes seconds on a photograph.
        upright.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _transparent_colour(picture: Any) -> object:
    """The transparent colour in the scale of the pixels, where Pillow left it in that of the file; else None.

    Pillow scales greys of 2 or 4 bits to 8, and takes the upper 8 bits of 16-bit RGB.
    """
    colour = picture.info.get("transparency")
    if picture.mode == "RGB" and isinstance(colour, tuple) and max(colour) > 255:
        return tuple(value >> 8 for value in colour)
    if picture.mode == "L" and isinstance(colour, int) and 0 < colour < 16:
        levels = [level for level, count in enumerate(picture.histogram()) if count]
        for step in (85, 17):
            if colour * step <= 255 and all(level % step == 0 for level in levels):
                return colour * step
    return None
