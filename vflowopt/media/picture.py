"""Picture: the bytes of an image file, checked and decoded to upright 8-bit RGB.

The bytes are not trusted: anything wrong with them raises a PictureError, and a picture's size is checked against the
limits before any pixel is decoded.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

Detail = Literal["high", "low"]
"""How closely a model reads a picture: "high": as its image processor allows; "low": an overview alone."""

Identity = tuple[str, Detail]
"""The key of a picture in caches: the digest of its bytes, and its detail."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The accepted file formats. Others that Pillow knows are refused, so that fewer decoders read untrusted bytes."""

# How files of these formats begin, to distinguish a damaged picture from a file of another kind.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """Bytes or pixels that are no usable picture.

    ``reason`` is one of PICTURE_EMPTY, PICTURE_NOT_AN_IMAGE, PICTURE_TRUNCATED (cut off or damaged),
    PICTURE_UNSUPPORTED (a colour mode that has no way to RGB), PICTURE_TOO_LARGE (bytes), PICTURE_TOO_MANY_PIXELS,
    PICTURE_TOO_SMALL (a side of 0) and PICTURE_TOO_NARROW; ``metadata`` holds the numbers in the message.
    """

    def __init__(self, reason: str, message: str, **metadata: object) -> None:
        """Set the reason, a word for programs, and the message, a sentence for people."""
        super().__init__(message)
        self.reason = reason
        self.metadata = {name: str(value) for name, value in metadata.items()}


@dataclass(frozen=True)
class PictureLimits:
    """Limits of a picture: bytes of the file, pixels after decoding, and the ratio of the longer side to the shorter.

    Pillow's own guard against decompression bombs (179 million pixels) applies with any ``max_pixels``. A picture
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
        """Read a PNG, JPEG, WebP, GIF, BMP or TIFF file; of an animation the first frame.

        The picture is turned upright as its EXIF orientation says, transparency is flattened on white, and 16-bit and
        floating-point greys are scaled to 8 bits, not clipped.

        Raises PictureError.
        """
        limits = limits or PictureLimits()
        if not data:
            raise PictureError("PICTURE_EMPTY", "the picture has no bytes; send the contents of an image file")
        if len(data) > limits.max_bytes:
            raise PictureError(
                "PICTURE_TOO_LARGE",
                f"the picture has {len(data)} bytes, at most {limits.max_bytes} are accepted; "
                "scale it down or compress it more",
                bytes=len(data),
                max_bytes=limits.max_bytes,
            )
        with _quiet, _open(data, limits) as image:
            limits.check(*image.size)
            try:
                image.load()
            except Image.DecompressionBombError:
                raise _bomb(limits) from None
            except Exception as error:
                raise _damaged(error) from None
            limits.check(*image.size)  # decoding may correct the size in the header
            turn = _UPRIGHT.get(_orientation(image))
            try:
                rgb = _to_rgb(image)
            except Exception as error:
                raise PictureError(
                    "PICTURE_UNSUPPORTED",
                    f"pixels of mode {image.mode} cannot be turned into RGB ({error}); send the picture as RGB or grey",
                    mode=image.mode,
                ) from None
        if turn is not None:
            rgb = rgb.transpose(turn)
        return cls(_read_only(np.array(rgb)), hashlib.sha256(data).hexdigest())

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


def _open(data: bytes, limits: PictureLimits) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _bomb(limits) from None
    except Exception as error:  # Pillow's readers raise exceptions of many types
        if data.startswith(_SIGNATURES):
            raise _damaged(error) from None
        raise PictureError(
            "PICTURE_NOT_AN_IMAGE",
            f"the bytes are not an image of an accepted format; send one of {', '.join(FORMATS)}",
            formats=",".join(FORMATS),
        ) from None


def _damaged(error: Exception) -> PictureError:
    unreadable = isinstance(error, UnidentifiedImageError)
    detail = "its header cannot be read, or says that it has no pixels" if unreadable else str(error)
    return PictureError("PICTURE_TRUNCATED", f"the picture is cut off or damaged ({detail}); send a whole, valid file")


def _bomb(limits: PictureLimits) -> PictureError:
    return PictureError(
        "PICTURE_TOO_MANY_PIXELS",
        f"the picture has far more than the {limits.max_pixels} pixels that are accepted; scale it down",
        max_pixels=limits.max_pixels,
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a picture with broken metadata is still a picture
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_eight_bits(image))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    flat = Image.new("RGB", layer.size, "white")
    flat.paste(layer, mask=layer)
    return flat


def _to_eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Scale wide greys to 0..255, [height, width].

    White is known in 16-bit files. In 32-bit and floating-point files it is not: the smallest usual range that includes
    all values is taken (0..1 for floats, 0..255, 0..65535), or else the picture's own range.
    """
    if image.mode.startswith("I;16"):
        return np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    customary = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    whites = [white for white in customary if 0.0 <= low and high <= white]
    if whites:
        low, high = 0.0, whites[0]
    values -= low
    values *= 255.0
    values /= (high - low) or 1.0  # a flat picture has no range: it turns black
    return np.rint(values).astype(np.uint8)


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
