"""The size of pictures that Pillow refuses for their size before it tells it."""

from __future__ import annotations

import struct


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas of a WebP file; None if its header is cut off."""
    kind = data[12:16]
    if len(data) < 30:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def gif_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas of a GIF file, which includes all of the first frame; None if it is cut off."""
    try:
        width, height, flags = struct.unpack_from("<HHB", data, 6)
        at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        while data[at : at + 1] == b"!":  # an extension: its kind, and blocks that begin with their length
            at += 2
            while data[at]:
                at += 1 + data[at]
            at += 1
        left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
    except (IndexError, struct.error):
        return None
    return max(width, left + frame_width), max(height, top + frame_height)
