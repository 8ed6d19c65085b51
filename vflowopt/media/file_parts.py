"""Counts the parts of a picture's file before it is decoded: scans, segments, chunks, blocks, tags and strips.

A decoder works for every part, however little it holds: a file of half a megabyte can have thousands of empty scans,
each of which passes over all pixels. The limits are far above what programs that save pictures write. Reading ends at
the limit, and never looks at single bytes, so it takes milliseconds for any file.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

MOST_SCANS = 100
"""Scans of a JPEG. Programs write about ten for a progressive one."""

MOST_SEGMENTS = 4096
"""Segments of a JPEG. A segment holds up to 64 KiB; programs split profiles and metadata into full ones."""

MOST_FILLING = 1 << 16
"""Bytes between the segments of a JPEG, or the parts of a GIF, that belong to none."""

MOST_CHUNKS = 20_000
"""Chunks of a PNG or WebP. Programs write pixels in chunks of 8 KiB or more."""

MOST_BLOCKS = 4096
"""Blocks of a GIF before its first frame. A block holds up to 255 bytes."""

MOST_TAGS = 4096
"""Tags of a TIFF. Programs write some dozens."""

MOST_NUMBERS = 200_000
"""Numbers in the tags of a TIFF, such as the offsets of its strips and tiles. A strip has one row at least."""


@dataclass(frozen=True)
class Excess:
    """What a file has too many of: its ``parts``, in the plural, of which there may be ``most``."""

    parts: str
    most: int


def excess_of(data: bytes) -> Excess | None:
    """What the file ``data`` has too many of; None if it is within the limits, or of no format that is known here."""
    for signature, count in _COUNTS.items():
        if data.startswith(signature):
            try:
                return count(data)
            except (struct.error, IndexError):  # it is cut off, as its decoder will say
                return None
    return None


# A marker of a JPEG, but for those within the data of a scan: stuffed bytes and restarts.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


def _of_jpeg(data: bytes) -> Excess | None:
    scans = segments = 0
    filling = MOST_FILLING
    at = 2
    while (found := _MARKER.search(data, at, len(data) if scans else at + filling + 2)) is not None:
        if not scans:
            filling -= found.start() - at
        at = found.end()
        segments += 1
        if segments > MOST_SEGMENTS:
            return Excess("segments", MOST_SEGMENTS)
        if data[at - 1] == _END_OF_IMAGE:
            return None
        scans += data[at - 1] == _START_OF_SCAN
        if scans > MOST_SCANS:
            return Excess("scans", MOST_SCANS)
        # The two markers without a length, TEM and SOI, are not found within a picture.
        at += struct.unpack_from(">H", data, at)[0]
    return Excess("filling bytes", MOST_FILLING) if not scans and at + filling < len(data) else None


def _of_png(data: bytes) -> Excess | None:
    at = 8
    for _ in range(MOST_CHUNKS):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return None
        if kind == b"eXIf" and (excess := _of_tiff(data[at + 8 : at + 8 + length])) is not None:
            return excess
        at += 12 + length
    return Excess("chunks", MOST_CHUNKS)


def _of_webp(data: bytes) -> Excess | None:
    at = 12
    for _ in range(MOST_CHUNKS):
        kind, length = struct.unpack_from("<4sI", data, at)
        exif = data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0") if kind == b"EXIF" else b""
        if exif and (excess := _of_tiff(exif)) is not None:
            return excess
        at += 8 + length + length % 2
    return Excess("chunks", MOST_CHUNKS)


# How a part of a GIF begins: an extension, a frame, or the end. Other bytes between the parts are skipped.
_PART = re.compile(rb"[\x21\x2c\x3b]")
_EXTENSION = 0x21


def _of_gif(data: bytes) -> Excess | None:
    at = 13 + _colours(data[10])
    blocks = filling = 0
    while (found := _PART.search(data, at)) is not None and data[found.start()] == _EXTENSION:
        filling += found.start() - at
        at = found.start() + 2  # its label follows, then blocks up to an empty one
        blocks += 1
        while length := data[at]:
            at += 1 + length
            blocks += 1
            if blocks > MOST_BLOCKS:
                return Excess("blocks", MOST_BLOCKS)
        at += 1
        if blocks > MOST_BLOCKS:
            return Excess("blocks", MOST_BLOCKS)
    filling += (len(data) if found is None else found.start()) - at
    return Excess("filling bytes", MOST_FILLING) if filling > MOST_FILLING else None


def _colours(flags: int) -> int:
    """Bytes of the palette of a GIF."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


_TIFF_TEXT = {1, 2, 6, 7}
"""Types whose values are bytes: they are read at once."""
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value, by type."""


def _of_tiff(data: bytes) -> Excess | None:
    order = "<" if data.startswith(b"II") else ">"
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    offset, count, entry = ("Q", "Q", "HHQ8x") if big else ("I", "H", "HHI4x")
    (at,) = struct.unpack_from(order + offset, data, 8 if big else 4)
    (tags,) = struct.unpack_from(order + count, data, at)
    if tags > MOST_TAGS:
        return Excess("tags", MOST_TAGS)
    at += struct.calcsize(order + count)
    nbytes = numbers = 0
    for _, kind, values in struct.iter_unpack(order + entry, data[at : at + tags * struct.calcsize(order + entry)]):
        nbytes += values * _TIFF_BYTES.get(kind, 0)
        numbers += 0 if kind in _TIFF_TEXT else values
    if numbers > MOST_NUMBERS:
        return Excess("numbers in its tags", MOST_NUMBERS)
    # Values that are longer than the file overlap: each tag would be read in full.
    return Excess("bytes in its tags", len(data)) if nbytes > 2 * len(data) + 65536 else None


_COUNTS = {
    b"\xff\xd8\xff": _of_jpeg,
    b"\x89PNG\r\n\x1a\n": _of_png,
    b"RIFF": _of_webp,
    b"GIF8": _of_gif,
    b"II*\0": _of_tiff,
    b"MM\0*": _of_tiff,
    b"II+\0": _of_tiff,
    b"MM\0+": _of_tiff,
}
