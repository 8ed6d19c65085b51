"""Picture files made byte by byte, so that a test knows what they hold without asking a decoder."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Samples = npt.NDArray[np.generic]

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:{prefix}="http://ns.adobe.com/tiff/1.0/"{attribute}>{element}</rdf:Description>'
    "</rdf:RDF></x:xmpmeta>"
)


def xmp(orientation: int, *, form: str = "attribute", prefix: str = "tiff") -> bytes:
    """An XMP packet that names an orientation as an attribute, quoted once or twice, or as an element."""
    attribute = {
        "attribute": f' {prefix}:Orientation="{orientation}"',
        "quoted once": f" {prefix}:Orientation='{orientation}'",
    }
    element = {"element": f"<{prefix}:Orientation>\n {orientation} </{prefix}:Orientation>"}
    return XMP.format(prefix=prefix, attribute=attribute.get(form, ""), element=element.get(form, "")).encode()


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """A file as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def packed(samples: Samples, bits: int, order: str) -> bytes:
    """Rows of samples, each row filled up to whole bytes; samples of less than 8 bits and of 12 from the top bit on."""
    if bits not in (1, 2, 4, 12):
        return samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    rows = []
    for row in samples.reshape(samples.shape[0], -1):
        digits = "".join(f"{int(value):0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        rows.append(int(digits, 2).to_bytes(len(digits) // 8, "big"))
    return b"".join(rows)


# PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_pixels(samples: Samples, bits: int) -> bytes:
    """Compressed rows without a filter."""
    width = len(packed(samples[:1], bits, ">"))
    rows = packed(samples, bits, ">")
    return zlib.compress(b"".join(b"\0" + rows[at : at + width] for at in range(0, len(rows), width)))


def png(samples: Samples, bits: int, colours: int, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG file of samples [height, width] or [height, width, n], with these chunks before and after its pixels."""
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    pixels = chunk(b"IDAT", png_pixels(samples, bits))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(before) + pixels + after + chunk(b"IEND", b"")


# TIFF

_TYPES = {2: "c", 3: "H", 4: "I", 7: "c", 16: "Q"}
_TYPE_OF = {256: 4, 257: 4, 273: 4, 278: 4, 279: 4, 322: 4, 323: 4, 324: 4, 325: 4, 700: 7, 34675: 7}


def tiff(
    samples: Samples,
    bits: int | Sequence[int],
    photometric: int | None,
    *,
    order: str = "<",
    big: bool = False,
    tags: Mapping[int, Sequence[int] | bytes] | None = None,
    parts: Sequence[bytes] | None = None,
    next_page: bool = False,
) -> bytes:
    """An uncompressed TIFF file of samples [height, width] or [height, width, n], in one strip.

    Args:
        samples: the samples.
        bits: bits of each sample.
        photometric: meaning of the samples, tag 262.
        order: "<" or ">".
        big: whether offsets have 64 bits.
        tags: further tags, and those to replace.
        parts: the strips, planes or tiles, if they are not one strip of all samples.
        next_page: whether a second page, a copy of the first, follows.
    """
    height, width = samples.shape[:2]
    each = [bits] * (samples.shape[2] if samples.ndim == 3 else 1) if isinstance(bits, int) else list(bits)
    parts = parts or [packed(samples, each[0], order)]
    head = 16 if big else 8
    offsets = list(itertools.accumulate([head, *map(len, parts)]))
    fields: dict[int, Sequence[int] | bytes] = {
        256: [width],
        257: [height],
        258: each,
        259: [1],
        273: offsets[:-1],
        277: [len(each)],
        278: [height],
        279: [len(part) for part in parts],
        **({} if photometric is None else {262: [photometric]}),
        **(tags or {}),
    }
    if 322 in fields:
        fields |= {324: fields.pop(273), 325: fields.pop(279)}
        del fields[278]
    body = b"".join(parts)
    body += b"\0" * (len(body) % 2)
    pages = 2 if next_page else 1
    start = head + len(body)
    directories = b""
    for page in range(pages):
        directories += _directory(fields, order, big, start + len(directories), last=page == pages - 1)
    if big:
        return struct.pack(order + "2sHHHQ", b"II" if order == "<" else b"MM", 43, 8, 0, start) + body + directories
    return struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, start) + body + directories


def _directory(fields: Mapping[int, Sequence[int] | bytes], order: str, big: bool, at: int, *, last: bool) -> bytes:
    count, entry, room, offset = ("Q", "HHQ", 8, "Q") if big else ("H", "HHI", 4, "I")
    size = struct.calcsize(order + count) + len(fields) * (struct.calcsize(order + entry) + room) + room
    entries, outside = b"", b""
    for tag, value in sorted(fields.items()):
        kind = _TYPE_OF.get(tag, 7 if isinstance(value, bytes) else 3)
        content = value if isinstance(value, bytes) else struct.pack(f"{order}{len(value)}{_TYPES[kind]}", *value)
        entries += struct.pack(order + entry, tag, kind, len(value))
        if len(content) <= room:
            entries += content.ljust(room, b"\0")
        else:
            entries += struct.pack(order + offset, at + size + len(outside))
            outside += content + b"\0" * (len(content) % 2)
    following = 0 if last else at + size + len(outside)
    return struct.pack(order + count, len(fields)) + entries + struct.pack(order + offset, following) + outside


# BMP


def bmp(
    rows: bytes,
    width: int,
    height: int,
    bits: int,
    *,
    header: int = 40,
    compression: int = 0,
    masks: Sequence[int] = (),
    palette: bytes = b"",
) -> bytes:
    """A BMP file; ``rows`` from the bottom up (from the top down if ``height`` is negative), filled up to 4 bytes."""
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        info = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(rows), 2835, 2835, 0, 0)
        if header > 40:
            info = (info + struct.pack(f"<{len(masks)}I", *masks)).ljust(header, b"\0")
        else:
            info += struct.pack(f"<{len(masks)}I", *masks)
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + info + palette + rows


# GIF


def gif_codes(indices: Sequence[int], bits: int) -> bytes:
    """LZW of indices that never builds a string: the table is cleared before each code."""
    clear, end = 1 << bits, (1 << bits) + 1
    digits = 0
    place = 0
    for code in [each for index in indices for each in (clear, index)] + [end]:
        digits |= code << place
        place += bits + 1
    content = digits.to_bytes((place + 7) // 8, "little")
    blocks = [content[at : at + 255] for at in range(0, len(content), 255)]
    return bytes([bits]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def gif(
    canvas: tuple[int, int],
    frames: Sequence[tuple[tuple[int, int, int, int], Sequence[int], bytes | None, int | None]],
    *,
    palette: bytes | None,
    background: int = 0,
    disposal: int = 0,
) -> bytes:
    """A GIF file of frames (box, indices, own palette, transparent index); palettes have 4 colours."""
    head = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x81 if palette else 0, background, 0) + (palette or b"")
    body = b""
    for box, indices, own, transparent in frames:
        flags = disposal << 2 | (transparent is not None)
        body += b"!\xf9\x04" + struct.pack("<BHB", flags, 10, transparent or 0) + b"\0"
        body += b"," + struct.pack("<HHHHB", *box, 0x81 if own else 0) + (own or b"") + gif_codes(indices, 2)
    return head + body + b";"


# JPEG


def segment(marker: int, content: bytes) -> bytes:
    """One segment of a JPEG file."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def lossless_jpeg(greys: Sequence[Sequence[int]], precision: int) -> bytes:
    """A lossless JPEG file (SOF3) that predicts from the left."""
    digits = ""
    for y, row in enumerate(greys):
        for x, grey in enumerate(row):
            before = row[x - 1] if x else greys[y - 1][0] if y else 1 << (precision - 1)
            difference = grey - before
            category = abs(difference).bit_length()
            digits += f"{category:05b}"
            if category:
                digits += f"{difference if difference > 0 else difference + (1 << category) - 1:0{category}b}"
    digits += "1" * (-len(digits) % 8)
    scan = int(digits, 2).to_bytes(len(digits) // 8, "big").replace(b"\xff", b"\xff\0")
    return (
        b"\xff\xd8"
        + segment(0xC3, struct.pack(">BHHB", precision, len(greys), len(greys[0]), 1) + b"\1\x11\0")
        + segment(0xC4, bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)]))
        + segment(0xDA, b"\1\1\0\1\0\0")
        + scan
        + b"\xff\xd9"
    )


def with_profile(jpeg: bytes, profile: bytes, size: int = 60_000) -> bytes:
    """A JPEG file with a colour profile, in segments of ``size`` bytes."""
    parts = [profile[at : at + size] for at in range(0, len(profile), size)]
    segments = (
        segment(0xE2, b"ICC_PROFILE\0" + bytes([number, len(parts)]) + part) for number, part in enumerate(parts, 1)
    )
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


# Colour profiles (ICC.1:2001)


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def _profile(kind: bytes, colours: bytes, between: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    white = (0.9642, 1.0, 0.8249)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 79
    tags = {b"desc": text, b"wtpt": _xyz(white), b"cprt": b"text\0\0\0\0none\0\0\0\0", **tags}
    table, content = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(content), len(value))
        content += value + b"\0" * (-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s", 132 - 4 + len(table) + len(content), b"none", 0x02400000, kind, colours, between)
    head += struct.pack(">6H4s4s4s4s4sQI", 2026, 1, 1, 0, 0, 0, b"acsp", b"none", b"\0" * 4, b"none", b"none", 0, 0)
    return (head + _fixed(*white)).ljust(128, b"\0") + table + content


def rgb_profile(gamma: float, red: Sequence[float], green: Sequence[float], blue: Sequence[float]) -> bytes:
    """A profile of three colorants in XYZ (D50) with one gamma."""
    curve = _gamma(gamma)
    colorants = {b"rXYZ": _xyz(red), b"gXYZ": _xyz(green), b"bXYZ": _xyz(blue)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", {**colorants, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def grey_profile(gamma: float) -> bytes:
    """A profile of greys."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _gamma(gamma)})


def cmyk_profile(corners: npt.NDArray[np.float64]) -> bytes:
    """A profile of four inks that is linear between its corners, L*a*b* [2, 2, 2, 2, 3]."""
    lab = corners.reshape(16, 3)
    grid = (
        np.stack([lab[:, 0] * 255 / 100, lab[:, 1] + 128, lab[:, 2] + 128], axis=1).round().astype(np.uint8).tobytes()
    )
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + grid + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})
