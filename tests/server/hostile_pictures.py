"""Files that are made to cost far more than they weigh: each is small, and decoding it takes long or much memory."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """The file of an image in a format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan, which is nearly empty, comes again and again."""
    data = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (scans - data.count(b"\xff\xda")) + data[-2:]


def jpeg_of_segments(segments: int) -> bytes:
    """A JPEG of 60 x 60 pixels with empty application segments."""
    data = encoded(Image.new("RGB", (60, 60)), "JPEG")
    return data[:2] + b"\xff\xe5\x00\x02" * segments + data[2:]


def jpeg_of_filling(nbytes: int) -> bytes:
    """A JPEG of 60 x 60 pixels with filling between two segments."""
    data = encoded(Image.new("RGB", (60, 60)), "JPEG")
    return data[:2] + b"\xff" * nbytes + data[2:]


def png_of_chunks(chunks: int) -> bytes:
    """A PNG of 60 x 60 pixels with empty chunks in front of the pixels."""
    data = encoded(Image.new("RGB", (60, 60)), "PNG")
    return data[:33] + chunk(b"juNk") * chunks + data[33:]


def png_of_texts(texts: int, nbytes: int) -> bytes:
    """A PNG of 60 x 60 pixels with compressed texts of ``nbytes`` each."""
    data = encoded(Image.new("RGB", (60, 60)), "PNG")
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(nbytes), 9))
    return data[:33] + text * texts + data[33:]


def png_of_exif(numbers: int) -> bytes:
    """A PNG of 60 x 60 pixels whose EXIF data has a tag with as many fractions."""
    data = encoded(Image.new("RGB", (60, 60)), "PNG")
    tag = struct.pack("<HHHII", 1, 0x112, 5, numbers, 26) + bytes(4)
    return data[:33] + chunk(b"eXIf", b"II*\0\x08\0\0\0" + tag + b"\1" * 8 * numbers) + data[33:]


def png_of_nothing(side: int, **options: object) -> bytes:
    """A PNG of ``side`` x ``side`` black pixels, which weighs next to nothing."""
    return encoded(Image.new("RGB", (side, side)), "PNG", **options)


def interlaced_png(side: int) -> bytes:
    """A PNG of as many black pixels, which come in seven passes."""
    passes = [(8, 8), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (2, 1)]
    rows = b"".join((bytes(1 + -(-side // width))) * (-(-side // height)) for height, width in passes)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND")


def bmp_of_runs(width: int, height: int, nbytes: int) -> bytes:
    """A run-length encoded BMP of ``nbytes``, whose runs have one pixel or end the line."""
    palette = bytes(1024)
    runs = b"\x01\x07\x00\x00" * (nbytes // 4)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    start = 14 + len(info) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(runs), 0, 0, start) + info + palette + runs


def gif_of_blocks(blocks: int) -> bytes:
    """A GIF of 60 x 60 pixels with a comment of blocks that hold one byte each."""
    data = encoded(Image.new("P", (60, 60)), "GIF")
    start = data.index(b"\x2c")
    return data[:start] + b"\x21\xfe" + b"\x01a" * blocks + b"\0" + data[start:]


def gif_of_filling(nbytes: int) -> bytes:
    """A GIF of 60 x 60 pixels with bytes before its frame that mean nothing."""
    data = encoded(Image.new("P", (60, 60)), "GIF")
    start = data.index(b"\x2c")
    return data[:start] + bytes(nbytes) + data[start:]


def tiff(tags: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    """A TIFF with tags of (number, type, count, value or offset)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + rest


def _plain(width: int, height: int) -> list[tuple[int, int, int, int]]:
    return [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]


def tiff_of_strips(strips: int) -> bytes:
    """A TIFF of many strips, which all are the same bytes."""
    tags = [*_plain(60, strips), (273, 4, strips, 200), (278, 3, 1, 1), (279, 4, strips, 200)]
    return tiff(tags, bytes(200 + 4 * strips))


def tiff_of_tags(tags: int, nbytes: int) -> bytes:
    """A TIFF whose tags all have the same ``nbytes`` as their value."""
    return tiff([*_plain(60, 60), *((40000 + tag, 7, nbytes, 8) for tag in range(tags))], bytes(nbytes))


def tiff_of_fractions(numbers: int) -> bytes:
    """A TIFF with a tag of many fractions."""
    return tiff([*_plain(60, 60), (282, 5, numbers, 100)], b"\1" * (100 + 8 * numbers))


def tiff_of_nothing(side: int) -> bytes:
    """A TIFF of ``side`` x ``side`` pixels, compressed to next to nothing."""
    return encoded(Image.new("RGB", (side, side)), "TIFF", compression="tiff_lzw")


def wide_tiff(side: int, kind: type) -> bytes:
    """A TIFF of numbers of 32 bits, compressed to next to nothing."""
    return encoded(Image.fromarray(np.zeros((side, side), kind)), "TIFF", compression="tiff_adobe_deflate")


def webp_of_nothing(side: int) -> bytes:
    """A lossless WebP of ``side`` x ``side`` black pixels."""
    return encoded(Image.new("RGB", (side, side)), "WEBP", lossless=True, method=0)


def hostile_files(megapixels: float) -> Mapping[str, Callable[[], bytes]]:
    """Makers of files by what each is: the large ones of as many ``megapixels``, the others in proportion.

    With 49 they are as large as a service accepts by default.
    """
    side = round((megapixels * 1e6) ** 0.5)
    part = megapixels / 49
    return {
        "a progressive JPEG of 6,000 scans": lambda: jpeg_of_scans(side, 6000),
        "a progressive JPEG of 100 scans": lambda: jpeg_of_scans(side, 100),
        "a JPEG of five million segments": lambda: jpeg_of_segments(round(part * 5e6)),
        "a JPEG of 20 MB of filling": lambda: jpeg_of_filling(round(part * 2e7)),
        "a PNG of 1.6 million chunks": lambda: png_of_chunks(round(part * 1.6e6)),
        "a PNG of texts that inflate": lambda: png_of_texts(2000, round(part * 1e6)),
        "a PNG of two million EXIF numbers": lambda: png_of_exif(round(part * 2e6)),
        "a large PNG": lambda: png_of_nothing(side),
        "an interlaced PNG": lambda: interlaced_png(side),
        "a large BMP of five million runs": lambda: bmp_of_runs(side, side, round(part * 2e7)),
        "a small BMP of five million runs": lambda: bmp_of_runs(60, 60, round(part * 2e7)),
        "a GIF of ten million blocks": lambda: gif_of_blocks(round(part * 1e7)),
        "a GIF of 20 MB of filling": lambda: gif_of_filling(round(part * 2e7)),
        "a TIFF of two million strips": lambda: tiff_of_strips(round(part * 2e6)),
        "a TIFF of overlapping tags": lambda: tiff_of_tags(4000, round(part * 1e7)),
        "a TIFF of two million fractions": lambda: tiff_of_fractions(round(part * 2e6)),
        "a large TIFF": lambda: tiff_of_nothing(side),
        "a TIFF of floats": lambda: wide_tiff(side, np.float32),
        "a TIFF of wide numbers": lambda: wide_tiff(side, np.int32),
        "a lossless WebP": lambda: webp_of_nothing(side),
    }
