"""JPEG files: kinds that are not read, and files that lack nothing but their end marker."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from io import BytesIO

from PIL import Image, JpegImagePlugin

_END = b"\xff\xd9"
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_HIERARCHICAL = {0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE}
_FRAMES = {*range(0xC0, 0xD0), 0xDE} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xCA}

_COEFFICIENTS = 64

# Two strings of bytes that decode to no picture in particular, and differ from the zeros that a decoder assumes behind
# the end. Without 0xFF, they hold no marker.
_PADDINGS = tuple(
    bytes((step * value + first) % 255 for value in range(1024)) for first, step in ((182, 73), (229, 91))
)

# A marker begins with 0xFF, or with several; within a scan 0xFF00 is data, and 0xFFD0 to 0xFFD7 restart the decoder.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")


def unread_kind(data: bytes) -> str | None:
    """What a decoder of 8-bit JPEG files cannot read in this one; None if that is nothing, or no header is found."""
    for marker, content in _segments(data):
        if marker in _FRAMES and len(content) >= 6:
            precision, components = content[0], content[5]
            if marker in _LOSSLESS:
                return f"lossless, {precision}-bit"
            if marker in _HIERARCHICAL:
                return "hierarchical"
            if precision != 8:
                return f"{precision}-bit"
            if content[1:3] == b"\0\0":
                return "height behind the pixels"
            return None if components in (1, 3, 4) else f"{components} components"
    return None


def without_end(data: bytes) -> Image.Image | None:
    """The picture in a file that was cut off behind its last pixel; None if the file lacks more.

    Some phones write panoramas without an end marker. Whether all pixels are there, the decoder does not say: it fills
    in what is missing. So the file is decoded with several ends. The pixels are equal if none depends on them.
    """
    if not _all_scans(data):
        return None
    data = data.rstrip(b"\xff")  # half of the marker
    picture = _decoded(data + _END)
    restart = _next_restart(data)
    for padding in _PADDINGS:
        if not _equal(picture, _decoded(data + padding + restart + padding + _END)):
            return None
    return picture


def _equal(one: Image.Image, other: Image.Image) -> bool:
    rows = max(1, (1 << 20) // one.width)
    boxes = ((0, top, one.width, min(top + rows, one.height)) for top in range(0, one.height, rows))
    return all(one.crop(box).tobytes() == other.crop(box).tobytes() for box in boxes)


def _next_restart(data: bytes) -> bytes:
    """The restart marker that would come next in the last scan, if it has any: they are counted from 0 to 7."""
    scan = data.rfind(bytes([0xFF, _START_OF_SCAN]))
    last = max(range(8), key=lambda number: data.rfind(bytes([0xFF, 0xD0 + number]), scan))
    found = data.rfind(bytes([0xFF, 0xD0 + last]), scan) >= 0
    return bytes([0xFF, 0xD0 + (last + 1) % 8 if found else 0xD0])


def _decoded(data: bytes) -> Image.Image:
    image = JpegImagePlugin.JpegImageFile(BytesIO(data))
    image.load()
    return image


def _all_scans(data: bytes) -> bool:
    """Whether the scans of a file without an end marker bring every coefficient of every component to its last bit."""
    missing: dict[int, list[int]] = {}
    progressive = False
    for marker, content in _segments(data):
        if marker == _END_OF_IMAGE:
            return False
        if marker in _FRAMES and len(content) >= 6:
            progressive = marker in _PROGRESSIVE
            missing = {component: [1] * _COEFFICIENTS for component in content[6::3]}
        elif marker == _START_OF_SCAN and content and len(content) >= 4 + 2 * content[0]:
            first, last, bits = content[-3:]
            for component in content[1 : 1 + 2 * content[0] : 2]:
                if not progressive:
                    missing[component] = [0] * _COEFFICIENTS
                elif component in missing and first <= last < _COEFFICIENTS:
                    missing[component][first : last + 1] = [bits & 15] * (last + 1 - first)
    return bool(missing) and not any(any(bits) for bits in missing.values())


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The markers of the first picture in a file, with what their segments contain."""
    at = 2
    while found := _MARKER.search(data, at):
        marker = found[1][0]
        at = found.end()
        if marker == 0x01:  # stands alone
            continue
        if marker == _END_OF_IMAGE or at + 2 > len(data):
            yield marker, b""
            return
        (length,) = struct.unpack_from(">H", data, at)
        yield marker, data[at + 2 : at + length]
        at += length
