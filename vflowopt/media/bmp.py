"""BMP files: run lengths, and kinds that are not read."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

_BITS_READ = (1, 4, 8, 16, 24, 32)
_PLAIN, _RLE8, _RLE4, _BIT_FIELDS = range(4)
RUN_LENGTHS = (_RLE8, _RLE4)

_END_OF_LINE, _END_OF_PICTURE, _MOVE = range(3)
_COMPRESSIONS = {4: "JPEG inside", 5: "PNG inside", 6: "bit fields with alpha", 11: "CMYK", 12: "CMYK", 13: "CMYK"}


def unread_kind(data: bytes) -> str | None:
    """What a file that Pillow does not open holds, if that is something a BMP file may hold; else None."""
    try:
        (header,) = struct.unpack_from("<I", data, 14)
        bits, compression = (
            (struct.unpack_from("<H", data, 24)[0], _PLAIN) if header == 12 else struct.unpack_from("<HI", data, 28)
        )
    except struct.error:
        return None
    if compression in _COMPRESSIONS:
        return f"{bits}-bit, {_COMPRESSIONS[compression]}"
    if bits in (2, 64):
        return f"{bits}-bit"
    if compression == _BIT_FIELDS and bits in _BITS_READ:
        return f"{bits}-bit, unusual bit fields"
    return None


def palette_indices(data: bytes, start: int, compression: int, width: int, height: int) -> npt.NDArray[np.uint8]:
    """The pixels of a file that is compressed by run lengths, uint8 [height, width]. Those left out are 0.

    Pillow takes a picture that ends early, or leaves out a line, for a damaged one.

    Args:
        data: the file.
        start: where its pixels begin.
        compression: one of ``RUN_LENGTHS``.
        width: pixels from left to right.
        height: pixels from top to bottom.

    Raises ValueError if the file is cut off.
    """
    pixels = bytearray(width * height)
    x, y, at = 0, height - 1, start
    while y >= 0:
        if at + 2 > len(data):
            if y == 0 and x >= width:
                break
            raise ValueError("its run lengths are cut off")
        count, value = data[at], data[at + 1]
        at += 2
        if count:
            pair = _nibbles(bytes([value])) if compression == _RLE4 else bytes([value, value])
            run = pair * (count + 1 >> 1)
        elif value == _END_OF_LINE:
            x, y = 0, y - 1
            continue
        elif value == _END_OF_PICTURE:
            break
        elif value == _MOVE:
            right, up = data[at : at + 2].ljust(2, b"\0")
            x, y, at = x + right, y - up, at + 2
            continue
        else:
            count, stored = value, value + 1 >> 1 if compression == _RLE4 else value
            run = data[at : at + stored]
            if len(run) < stored:
                raise ValueError("its run lengths are cut off")
            run = _nibbles(run) if compression == _RLE4 else run
            at += stored + stored % 2  # filled up to 16 bits
        fits = max(0, min(count, width - x))
        place = y * width + x
        pixels[place : place + fits] = run[:fits]
        x += count
    return np.frombuffer(pixels, np.uint8).reshape(height, width)


def _nibbles(stored: bytes) -> bytes:
    """Two pixels a byte, one byte each."""
    return bytes(nibble for byte in stored for nibble in (byte >> 4, byte & 15))
