"""TIFF files: how their samples are stored, and kinds that are not read."""

from __future__ import annotations

from io import BytesIO

from PIL import ImagePalette, TiffImagePlugin

from vflowopt.media.greys import SampleType

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_BYTES_OF_STRIPS, _COLOUR_MAP, _SAMPLE_FORMAT, _SUBSAMPLING = 279, 320, 339, 530

_KINDS = {1: "u", 2: "i", 3: "f"}
_KIND_NAMES = {1: "unsigned", 2: "signed", 3: "floating point", 4: "untyped", 5: "complex", 6: "complex"}
_COLOURS = {
    0: "grey, white is zero",
    1: "grey",
    2: "RGB",
    3: "palette",
    4: "mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIE L*a*b*",
    9: "ICC L*a*b*",
    10: "ITU L*a*b*",
    32803: "colour filter array",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw",
}
_MOST_COMPRESSION = 65535


def sample_type(image: TiffImagePlugin.TiffImageFile) -> SampleType | None:
    """How greys are stored; None for colours, and for plain 8-bit greys and less, which Pillow reads as they are."""
    kind = _KINDS.get(_first(image.tag_v2.get(_SAMPLE_FORMAT, 1)), "u")
    bits = _first(image.tag_v2.get(_BITS, 1))
    if image.mode not in ("L", "I", "F") and not image.mode.startswith("I;16"):
        return None
    if image.mode == "L" and (kind != "i" or bits != 8):
        return None
    return SampleType(bits, kind, white_is_zero=image.tag_v2.get(_PHOTOMETRIC) == 0)


def mend_palette(image: TiffImagePlugin.TiffImageFile) -> None:
    """Take a palette as it was meant: some writers give it in 8 bits, where the format says 16."""
    colours = image.tag_v2.get(_COLOUR_MAP, ())
    if image.mode in ("P", "PA") and colours and max(colours) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def subsampled(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether colours have a lower resolution in a file without compression. Pillow would read them as if not."""
    if image.mode != "YCbCr" or image.tag_v2.get(_COMPRESSION, 1) != 1:
        return False
    if tuple(image.tag_v2.get(_SUBSAMPLING, (2, 2))) == (1, 1):
        return False
    return sum(image.tag_v2.get(_BYTES_OF_STRIPS, (0,))) < 3 * image.width * image.height


def unread_kind(data: bytes) -> str | None:
    """What a file that Pillow does not open holds, if that is something a TIFF file may hold; else None."""
    try:
        header = data[:16] if data[2:3] == b"+" or data[3:4] == b"+" else data[:8]
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file = BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits, sample_format = tags.get(_BITS, (1,)), _first(tags.get(_SAMPLE_FORMAT, 1))
        colours, compression = tags.get(_PHOTOMETRIC, 1), tags.get(_COMPRESSION, 1)
        whole = tags[_WIDTH] > 0 and tags[_HEIGHT] > 0 and all(1 <= each <= 64 for each in bits)
        whole = whole and colours in _COLOURS and sample_format in _KIND_NAMES and 1 <= compression <= _MOST_COMPRESSION
    except MemoryError:
        raise
    except Exception:  # Pillow's reader raises exceptions of many types
        return None
    if not whole:
        return None
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        return f"compression {compression}"
    plain = set(bits) <= {1, 8} and sample_format == 1 and colours in (0, 1, 2, 3, 5, 6) and len(bits) in (1, 3, 4)
    return None if plain else f"{_COLOURS[colours]}, {'/'.join(map(str, bits))}-bit {_KIND_NAMES[sample_format]}"


def _first(value: object) -> int:
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, int) else 1
