"""Picture files that cost far more to decode than to send."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

_MOST_BYTES = 20 * 2**20 - 1024
"""Bytes of the largest files: nearly as many as the service accepts of a picture by default."""


def progressive_scans(side: int = 7000, scans: int = 6000) -> bytes:
    """A grey progressive JPEG whose every scan goes over the whole picture and changes nothing.

    Half a megabyte at the defaults. A scan of a progressive picture visits every block, even if the file holds nothing
    for it but runs of "nothing follows".

    Args:
        side: pixels of a side, a multiple of 8.
        scans: number of scans after the first.
    """
    blocks = (side // 8) ** 2
    start_of_frame = _segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0))
    quantization = _segment(0xDB, b"\0" + b"\1" * 64)
    # One code of one bit each: "no change of the mean", and "the next 16,384 and more blocks end here".
    codes = _segment(0xC4, b"\0" + b"\1" + b"\0" * 15 + b"\0") + _segment(0xC4, b"\x10" + b"\1" + b"\0" * 15 + b"\xe0")
    first = _scan(0, 0) + b"\0" * (blocks // 8 + 1)
    run = "0" + "1" * 14  # 2^14 + (2^14 - 1) blocks
    empty = _scan(1, 63) + _stuffed(run * (blocks // 32767 + 1))
    return b"\xff\xd8" + quantization + start_of_frame + codes + first + empty * scans + b"\xff\xd9"


def png_of_empty_chunks(side: int = 64) -> bytes:
    """A small PNG with 1.7 million chunks that hold nothing."""
    image = _png(Image.new("RGB", (side, side), "red"))
    header = len(b"\x89PNG\r\n\x1a\n") + 12 + 13
    chunk = struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    return image[:header] + chunk * ((_MOST_BYTES - len(image)) // len(chunk)) + image[header:]


def jpeg_of_empty_segments(side: int = 64) -> bytes:
    """A small JPEG with five million application segments that hold nothing."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "JPEG")
    image = file.getvalue()
    segment = b"\xff\xe1\0\2"
    return image[:2] + segment * ((_MOST_BYTES - len(image)) // len(segment)) + image[2:]


def run_length_bmp(side: int = 3000) -> bytes:
    """A BMP of nine million runs of one pixel."""
    rows = (b"\1\0" * side + b"\0\0") * side + b"\0\1"
    palette = b"".join(bytes((value, value, value, 0)) for value in range(256))
    offset = 14 + 40 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 2835, 2835, 256, 0)
    return header + info + palette + rows


def large_png(side: int = 7050, mode: str = "RGB") -> bytes:
    """A PNG of one colour, just within the default bound on pixels: a hundred kilobytes, 50 million pixels."""
    return _png(Image.new(mode, (side, side)))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def _scan(first: int, last: int) -> bytes:
    """The header of a scan of the coefficients ``first`` to ``last`` of the only component."""
    return _segment(0xDA, bytes((1, 1, 0x00, first, last, 0)))


def _stuffed(bits: str) -> bytes:
    """``bits`` as bytes, filled up with ones; a zero follows each byte of ones, as JPEG asks for."""
    padded = bits + "1" * (-len(bits) % 8)
    return int(padded, 2).to_bytes(len(padded) // 8, "big").replace(b"\xff", b"\xff\0")
