"""BMP files: kinds that are not read."""

from __future__ import annotations

import struct

_BITS_READ = (1, 4, 8, 16, 24, 32)
_PLAIN, _RLE8, _RLE4, _BIT_FIELDS = range(4)
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
