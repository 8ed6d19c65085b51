"""The first frame of a picture file: decoded by Pillow, with what its format says about it beyond its pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
    features,
)

from vflowopt.media import bmp, jpeg, orientation, tiff
from vflowopt.media.error import PictureError, damaged, unsupported
from vflowopt.media.frame_size import gif_size, webp_size
from vflowopt.media.greys import SampleType
from vflowopt.media.png import read_png

Check = Callable[[int, int], None]
"""Raises PictureError unless a picture of this width and height may be decoded."""

# Pillow's classes are called one by one: `Image.open` would hide why a file is refused, and would try others, too.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": tiff.TiffFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
_UNREAD_KINDS = {"JPEG": jpeg.unread_kind, "BMP": bmp.unread_kind, "TIFF": tiff.unread_kind}
_SIZES = {"WEBP": webp_size, "GIF": gif_size}


@dataclass(frozen=True)
class Frame:
    """The first frame of a picture file.

    Attributes:
        image: the frame as it is stored, in any mode.
        canvas: width and height of the whole picture as it is stored.
        place: left and top edge of the frame on the canvas.
        orientation: 1 to 8, as EXIF counts: how to turn the picture.
        profile: the bytes of the colour profile, if there is one.
        greys: how the greys are stored, unless as plain 8 bits.
        transparent: the samples of the transparent colour, if there is one.
        low_bytes: the lower bytes of the samples, where ``image`` has the higher ones and ``transparent`` names both.
    """

    image: Image.Image
    canvas: tuple[int, int]
    place: tuple[int, int] = (0, 0)
    orientation: int = 1
    profile: object = None
    greys: SampleType | None = None
    transparent: tuple[int, ...] | None = None
    low_bytes: Image.Image | None = None


def read_frame(form: str, data: bytes, check: Check) -> Frame:
    """Decode the first frame of a file of a known format.

    Args:
        form: the format, as :func:`~vflowopt.media.file_format.format_of` names it.
        data: the file.
        check: called with the size of the picture before its pixels are decoded.

    Raises:
        PictureError: the file is damaged, too large, or of a kind that is not read.
        MemoryError: there is not enough memory.
    """
    match form:
        case "PNG":
            return _png(data, check)
        case "JPEG":
            return _jpeg(data, check)
        case "GIF":
            return _gif(data, check)
        case "BMP":
            return _bmp(data, check)
        case "TIFF":
            return _tiff(data, check)
    if form == "WEBP" and (size := webp_size(data)) is not None:
        check(*size)  # its reader takes memory for the pixels at once
    image = _open(form, data)
    check(*image.size)
    turn = 1 if form == "HEIC" else _orientation(image, form)  # the plugin has turned the picture
    _load(form, image)
    return Frame(image, image.size, orientation=turn, profile=image.info.get("icc_profile"))


def _png(data: bytes, check: Check) -> Frame:
    png = read_png(data)
    if data[12:16] == b"CgBI":
        raise unsupported("PNG", "CgBI")  # Apple's variant for applications on phones
    image = _open("PNG", png.still)
    check(*(png.canvas or image.size))
    _load("PNG", image)
    bits = 16 if image.mode.startswith("I;16") else png.depth
    grey = image.mode in ("1", "L", "I;16")
    transparent = png.transparent
    if transparent is not None and grey and bits < 16:
        transparent = (transparent[0] * 255 // ((1 << bits) - 1),)
    low = png.low_bytes() if png.depth == 16 and transparent is not None and not grey else None
    return Frame(
        image,
        png.canvas or image.size,
        png.place,
        _of_metadata(png.exif, png.xmp),
        png.icc_profile,
        SampleType(16, "u") if bits == 16 and grey else None,
        transparent,
        low,
    )


def _jpeg(data: bytes, check: Check) -> Frame:
    kind = jpeg.unread_kind(data)
    if kind is not None and not kind.startswith("lossless, 8-bit"):
        raise unsupported("JPEG", kind)
    image: Image.Image = _open("JPEG", data)
    check(*image.size)
    turn = _orientation(image, "JPEG")
    profile = image.info.get("icc_profile")
    try:
        _load("JPEG", image)
    except PictureError:
        if kind is not None:
            raise unsupported("JPEG", kind) from None
        image.close()
        try:
            whole = jpeg.without_end(data)
        except MemoryError:
            raise
        except Exception:
            whole = None
        if whole is None:
            raise
        image = whole
    return Frame(image, image.size, orientation=turn, profile=profile)


def _gif(data: bytes, check: Check) -> Frame:
    image = _open("GIF", data)
    check(*image.size)
    box = image.tile[0].extents if image.tile else None
    _load("GIF", image)
    left, top, right, bottom = (0, 0, *image.size) if box is None else box
    # A palette of greys is no palette to Pillow: then the transparent entry is a grey.
    transparent = (image.info.pop("transparency"),) if image.mode == "L" and "transparency" in image.info else None
    if (right - left, bottom - top) == image.size:
        return Frame(image, image.size, transparent=transparent)
    return Frame(image.crop((left, top, right, bottom)), image.size, (left, top), transparent=transparent)


def _bmp(data: bytes, check: Check) -> Frame:
    file = _open("BMP", data)
    check(*file.size)
    image = _run_lengths(data, file) if file.info["compression"] in bmp.RUN_LENGTHS else file
    _load("BMP", image)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        # Writers that know no alpha leave it at 0: browsers take such a picture as opaque.
        image.putalpha(255)
    return Frame(image, image.size)


def _run_lengths(data: bytes, file: ImageFile.ImageFile) -> Image.Image:
    """The picture in a BMP file of run lengths, of which Pillow has read the header and the palette."""
    try:
        indices = bmp.palette_indices(data, file.tile[0].offset, file.info["compression"], *file.size)
        image = Image.fromarray(np.where(indices, np.uint8(255), np.uint8(0)) if file.mode == "1" else indices)
        if file.palette is not None:
            image.putpalette(file.palette.palette, file.palette.rawmode or "RGB")
    except ValueError as error:
        raise _broken("BMP", error) from None
    return image


def _tiff(data: bytes, check: Check) -> Frame:
    image = _open("TIFF", data)
    assert isinstance(image, tiff.TiffFile)
    check(*image.size)
    if kind := image.misread_kind:
        raise unsupported("TIFF", kind)
    greys = image.greys
    xmp = image.info.pop("xmp", None)
    # Pillow turns the picture as the tag says, and does not know XMP any more.
    turn = 1 if 0x0112 in image.tag_v2 else orientation.of_xmp(xmp) or 1
    try:
        _load("TIFF", image)
    except PictureError as error:
        if error.reason == "PICTURE_TRUNCATED" and image.info["compression"] in tiff.RARE_COMPRESSIONS:
            raise unsupported("TIFF", f"compression {image.info['compression']}") from None
        raise
    return Frame(image, image.size, orientation=turn, profile=image.info.get("icc_profile"), greys=greys)


def _open(form: str, data: bytes) -> ImageFile.ImageFile:
    """Read the header of a file."""
    reader = _heic_reader() if form == "HEIC" else _READERS[form]
    if form in ("AVIF", "WEBP") and not features.check(form.lower()):
        raise unsupported(form, "any", "the service's Pillow lacks the decoder: send the picture as PNG or JPEG")
    try:
        return reader(BytesIO(data), "")
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        size = _SIZES[form](data) if form in _SIZES else None
        raise _bomb(form, size) from None
    except Exception as error:  # Pillow's readers raise exceptions of many types
        _let_want_of_memory_through(error)
        kind = _UNREAD_KINDS[form](data) if form in _UNREAD_KINDS else None
        raise unsupported(form, kind) if kind else _broken(form, error) from None


def _load(form: str, image: Image.Image) -> None:
    """Decode the pixels."""
    try:
        image.load()
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise _bomb(form, image.size) from None
    except Exception as error:
        _let_want_of_memory_through(error)
        if "unknown raw mode" in str(error):  # known to the reader of the format, but not to Pillow's core
            raise unsupported(form, image.mode) from None
        raise _broken(form, error) from None


def _let_want_of_memory_through(error: Exception) -> None:
    """Raise MemoryError if that is what a decoder means: it is no fault of the picture."""
    if "out of memory" in str(error).lower():
        raise MemoryError(str(error)) from None


def _broken(form: str, error: Exception) -> PictureError:
    empty = str(error) in ("not identified by this driver", "no more images in GIF file")
    detail = " ".join(str(error).split()) or type(error).__name__
    return damaged(form, "it says that it has no pixels" if empty else detail)


def _bomb(form: str, size: tuple[int, int] | None) -> PictureError:
    if size is None:
        return damaged(form, "its header is cut off")
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return PictureError(
        "PICTURE_TOO_MANY_PIXELS",
        f"the picture is {size[0]} x {size[1]} = {size[0] * size[1]} pixels, at most {most} are decoded; scale it down",
        width=size[0],
        height=size[1],
        max_pixels=most,
    )


def _heic_reader() -> type[ImageFile.ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise unsupported(
            "HEIC",
            "HEVC",
            "install vflowopt[heic] where the picture is decoded, or send it as JPEG or PNG",
        ) from None
    reader: type[ImageFile.ImageFile] = HeifImageFile
    return reader


def _orientation(image: Image.Image, form: str) -> int:
    """The orientation that the metadata of a file name. XMP stands behind EXIF, and counts where EXIF is silent."""
    xmp = image.info.pop("xmp", None)  # Pillow would read it, too, but not every form of it
    try:
        turn = orientation.of_exif(image.getexif())
    except MemoryError:
        raise
    except Exception:  # a picture with broken metadata is still a picture
        turn = None
    return turn or (orientation.of_xmp(xmp) if form != "AVIF" else None) or 1


def _of_metadata(exif: bytes | None, xmp: bytes | None) -> int:
    found = Image.Exif()
    try:
        found.load(exif or b"")
        turn = orientation.of_exif(found)
    except MemoryError:
        raise
    except Exception:
        turn = None
    return turn or orientation.of_xmp(xmp) or 1
