"""Picture: the bytes of an image file, checked and decoded to upright 8-bit RGB.

The bytes are not trusted: anything wrong with them raises a PictureError, and a picture's size is checked against the
limits before any pixel is decoded.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from vflowopt.media.error import PictureError, unsupported
from vflowopt.media.file_format import FORMATS, format_of
from vflowopt.media.file_parts import excess_of
from vflowopt.media.frame import read_frame
from vflowopt.media.rgb import to_rgb

__all__ = ["FORMATS", "Detail", "Identity", "Picture", "PictureError", "PictureLimits"]

Detail = Literal["high", "low"]
"""How closely a model reads a picture: "high": as its image processor allows; "low": an overview alone."""

Identity = tuple[str, Detail]
"""The key of a picture in caches: the digest of its bytes, and its detail."""


@dataclass(frozen=True)
class PictureLimits:
    """Limits of a picture: bytes of the file, pixels after decoding, and the ratio of the longer side to the shorter.

    Pillow's own bound of 179 million pixels applies to WebP, GIF and TIFF with any ``max_pixels``. A picture
    beyond ``max_aspect`` would lose its shorter side when a model scales it down.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    max_aspect: int = 200

    def __post_init__(self) -> None:
        """Raise ValueError unless all limits are positive."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def check_file(self, data: bytes) -> None:
        """Raise PictureError unless a file with these bytes may be read."""
        if not data:
            raise PictureError("PICTURE_EMPTY", "the picture has no bytes; send the contents of an image file")
        if len(data) > self.max_bytes:
            raise PictureError(
                "PICTURE_TOO_LARGE",
                f"the picture has {len(data)} bytes, at most {self.max_bytes} are accepted; "
                "scale it down or compress it more",
                bytes=len(data),
                max_bytes=self.max_bytes,
            )

    def check(self, width: int, height: int) -> None:
        """Raise PictureError unless a picture of this size may be decoded."""
        size = {"width": width, "height": height}
        if width < 1 or height < 1:
            raise PictureError(
                "PICTURE_TOO_SMALL",
                f"the picture is {width} x {height} pixels; send one of at least 1 x 1",
                **size,
            )
        if width * height > self.max_pixels:
            raise PictureError(
                "PICTURE_TOO_MANY_PIXELS",
                f"the picture is {width} x {height} = {width * height} pixels, at most {self.max_pixels} are accepted; "
                "scale it down",
                **size,
                max_pixels=self.max_pixels,
            )
        if max(width, height) > self.max_aspect * min(width, height):
            raise PictureError(
                "PICTURE_TOO_NARROW",
                f"the picture is {width} x {height} pixels; its longer side may be at most {self.max_aspect} times "
                "the shorter: crop or pad it",
                **size,
                max_aspect=self.max_aspect,
            )


@dataclass(frozen=True, eq=False)
class Picture:
    """One upright picture.

    Attributes:
        pixels: uint8 [height, width, 3], RGB, read-only.
        digest: SHA-256 of the bytes as sent, in hex.
        detail: how closely a model reads it.
    """

    pixels: npt.NDArray[np.uint8]
    digest: str
    detail: Detail = "high"

    @property
    def identity(self) -> Identity:
        """The key of the picture in caches."""
        return self.digest, self.detail

    def in_detail(self, detail: Detail) -> Picture:
        """The same picture with another detail; the two share their pixels."""
        return self if detail == self.detail else replace(self, detail=detail)

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return int(self.pixels.shape[0])

    @classmethod
    def decode(cls, data: bytes, limits: PictureLimits | None = None) -> Picture:
        """Read a picture file; of an animation the first frame.

        The formats are PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF and, where its plugin is installed, HEIC.
        The picture is turned upright as its EXIF or XMP orientation says, its colours are converted to sRGB as its
        profile says, transparency is flattened on white, and greys of more than 8 bits are scaled, not clipped.

        Raises:
            PictureError: the bytes are no usable picture.
            MemoryError: there is not enough memory to decode them.
        """
        limits = limits or PictureLimits()
        limits.check_file(data)
        if (excess := excess_of(data)) is not None:
            raise PictureError(
                "PICTURE_TOO_COMPLEX",
                f"the file has more than {excess.most} {excess.parts}, which take long to read; save it anew, and send "
                "a plain JPEG or PNG",
                resource=excess.parts,
                max=excess.most,
            )
        form = format_of(data)
        if form is None:
            raise PictureError(
                "PICTURE_NOT_AN_IMAGE",
                f"the bytes are not an image of an accepted format; send one of {', '.join(FORMATS)}",
                formats=",".join(FORMATS),
            )
        with _quiet:
            frame = read_frame(form, data, limits.check)
            limits.check(*frame.canvas)  # decoding may correct the size in the header
            try:
                pixels = to_rgb(frame)
            except ValueError:
                raise unsupported(form, frame.image.mode) from None
        return cls(_read_only(pixels), hashlib.sha256(data).hexdigest())

    @classmethod
    def from_pixels(cls, pixels: npt.NDArray[np.uint8], limits: PictureLimits | None = None) -> Picture:
        """Take decoded pixels, uint8 [height, width, 3] RGB; the digest is that of their size and values.

        Raises PictureError.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise PictureError(
                "PICTURE_NOT_AN_IMAGE",
                f"expected uint8 pixels of shape (height, width, 3), got {pixels.dtype} {pixels.shape}",
            )
        height, width, _ = pixels.shape
        (limits or PictureLimits()).check(width, height)
        own = _read_only(np.array(pixels, order="C"))
        # The size goes in too: a 2 x 3 and a 3 x 2 picture may hold the same bytes.
        return cls(own, hashlib.sha256(f"{width}x{height}:".encode() + own.tobytes()).hexdigest())


def _read_only(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    pixels.flags.writeable = False
    return pixels


class _Quiet:
    """Suppresses Pillow's warnings about a file: limits and errors already report what a caller needs.

    Warning filters belong to the whole process, so two threads that set and restore them in turn could restore the
    wrong ones. Here the first thread to enter sets them, and the last one to leave restores them. Decoding stays
    parallel.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()
