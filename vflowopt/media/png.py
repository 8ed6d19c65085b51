"""PNG files: what Pillow does not tell of them, and what it is better not shown.

Pillow refuses a whole picture for a text or a colour profile that inflates to more than 1 MiB or has a wrong checksum.
So the chunks that hold no pixels are read here, within bounds, and left out of what Pillow reads.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, PngImagePlugin

_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_MOST_INFLATED = 8 << 20
"""Bytes of a compressed chunk of metadata at most, once inflated. What is larger is ignored."""

_GREY, _RGB, _PALETTE = 0, 2, 3
_SAMPLES = {_GREY: 1, _RGB: 3}


@dataclass(frozen=True)
class PngFile:
    """One PNG file.

    Attributes:
        still: a PNG file of the first frame alone, without metadata.
        canvas: width and height of the picture, of which the first frame of an animation may fill a part only.
        place: left and top edge of the frame on the canvas.
        transparent: the samples of the transparent colour, where a grey or RGB picture names one.
        depth: bits of a sample.
        icc_profile, exif, xmp: metadata, as far as there is any.
    """

    still: bytes
    canvas: tuple[int, int] | None = None
    place: tuple[int, int] = (0, 0)
    transparent: tuple[int, ...] | None = None
    depth: int = 8
    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None

    def low_bytes(self) -> Image.Image:
        """The lower bytes of the samples of a 16-bit RGB picture, as 8-bit RGB; Pillow keeps the higher ones only."""
        image = PngImagePlugin.PngImageFile(BytesIO(self.still))
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        image.load()
        return image


@dataclass(frozen=True)
class _Chunk:
    """One chunk: its kind, where its length begins and its checksum ends, and what it contains."""

    kind: bytes
    start: int
    end: int
    content: memoryview


def read_png(data: bytes) -> PngFile:
    """Sort the chunks of a PNG file. What is missing or broken is left for Pillow to find."""
    drawn: list[_Chunk] = []
    named: dict[bytes, _Chunk] = {}
    frame: list[_Chunk] = []
    frames = 0
    pixels_seen = framed_before_pixels = False
    for chunk in _chunks(data):
        match chunk.kind:
            case b"IHDR" | b"PLTE" | b"IDAT" | b"IEND":
                drawn.append(chunk)
                pixels_seen = pixels_seen or chunk.kind == b"IDAT"
            case b"fcTL":
                frames += 1
                framed_before_pixels = framed_before_pixels or not pixels_seen
                if frames == 1:
                    frame.append(chunk)
            case b"fdAT":
                if frames == 1:
                    frame.append(chunk)
            case b"zTXt" | b"iTXt":
                keyword = bytes(chunk.content[:80]).partition(b"\0")[0]
                named.setdefault(keyword, chunk)
            case kind:
                if kind == b"tRNS":
                    drawn.append(chunk)
                named.setdefault(kind, chunk)
    if not drawn or drawn[0].kind != b"IHDR" or len(drawn[0].content) < 13:
        return PngFile(data)
    width, height, depth, colours = struct.unpack_from(">IIBB", drawn[0].content)
    trns = named.get(b"tRNS")
    if colours != _PALETTE:
        drawn = [chunk for chunk in drawn if chunk.kind != b"tRNS"]
    place = (0, 0)
    still = None
    if b"acTL" in named and not framed_before_pixels:
        still, place = _first_frame(drawn, frame, (width, height))
    return PngFile(
        still or _joined(data, drawn),
        (width, height),
        place,
        _transparent(trns, colours, depth),
        depth,
        _profile(named.get(b"iCCP")),
        bytes(named[b"eXIf"].content) if b"eXIf" in named else _raw_profile(named.get(b"Raw profile type exif")),
        _text(named.get(b"XML:com.adobe.xmp")) or _raw_profile(named.get(b"Raw profile type xmp")),
    )


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """The chunks of a file up to its end, the last of which may be cut off."""
    view = memoryview(data)
    start = len(_SIGNATURE)
    while start < len(data):
        head = bytes(view[start : start + 8])
        length = int.from_bytes(head[:4], "big")
        end = min(start + 12 + length, len(data))
        kind = head[4:]
        yield _Chunk(kind, start, end, view[start + 8 : min(start + 8 + length, end)])
        if kind == b"IEND":
            return
        start = end


def _joined(data: bytes, chunks: list[_Chunk]) -> bytes:
    """The file with these chunks alone."""
    spans: list[list[int]] = [[0, len(_SIGNATURE)]]
    for chunk in chunks:
        if spans[-1][1] == chunk.start:
            spans[-1][1] = chunk.end
        else:
            spans.append([chunk.start, chunk.end])
    if spans == [[0, len(data)]]:
        return data
    view = memoryview(data)
    return b"".join(view[start:end] for start, end in spans)


def _first_frame(
    drawn: list[_Chunk], frame: list[_Chunk], canvas: tuple[int, int]
) -> tuple[bytes | None, tuple[int, int]]:
    """The first frame of an animation that does not begin with the picture of its file, and its place.

    None if the animation is broken: then the picture of the file is taken, as the specification says.
    """
    if len(frame) < 2 or len(frame[0].content) < 26:
        return None, (0, 0)
    width, height, left, top = struct.unpack_from(">IIII", frame[0].content, 4)
    if not (0 < width <= canvas[0] - left and 0 < height <= canvas[1] - top):
        return None, (0, 0)
    header = struct.pack(">II", width, height) + bytes(drawn[0].content[8:13])
    shared = [(chunk.kind, bytes(chunk.content)) for chunk in drawn if chunk.kind in (b"PLTE", b"tRNS")]
    parts = [(b"IDAT", bytes(chunk.content[4:])) for chunk in frame[1:]]
    chunks = [(b"IHDR", header), *shared, *parts, (b"IEND", b"")]
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ), (left, top)


def _transparent(chunk: _Chunk | None, colours: int, depth: int) -> tuple[int, ...] | None:
    """The transparent colour that tRNS names. Bits beyond the depth of the samples do not count."""
    samples = _SAMPLES.get(colours, 0)
    if chunk is None or not samples or len(chunk.content) < 2 * samples:
        return None
    return tuple(value & ((1 << depth) - 1) for value in struct.unpack_from(f">{samples}H", chunk.content))


def _profile(chunk: _Chunk | None) -> bytes | None:
    """The profile in iCCP: a name, a zero, a zero for the method of compression, and the profile."""
    if chunk is None:
        return None
    name = bytes(chunk.content[:80]).partition(b"\0")[0]
    return _inflated(chunk.content[len(name) + 2 :])


def _text(chunk: _Chunk | None) -> bytes | None:
    """The text in zTXt (keyword, method, text) or iTXt (keyword, flag, method, language, keyword, text)."""
    if chunk is None:
        return None
    keyword = bytes(chunk.content[:80]).partition(b"\0")[0]
    rest = chunk.content[len(keyword) + 1 :]
    if chunk.kind == b"zTXt":
        return _inflated(rest[1:])
    parts = bytes(rest[2:]).split(b"\0", 2)
    if len(rest) < 2 or len(parts) < 3:
        return None
    return _inflated(memoryview(parts[2])) if rest[0] else parts[2]


def _raw_profile(chunk: _Chunk | None) -> bytes | None:
    """What ImageMagick puts into a text: a blank line, a name and a length, a line each, and hexadecimal digits."""
    lines = (_text(chunk) or b"").split(b"\n")
    try:
        return bytes.fromhex(b"".join(lines[3:]).decode("ascii")) or None
    except ValueError:
        return None


def _inflated(compressed: memoryview) -> bytes | None:
    """What a zlib stream holds; None if it is broken, or longer than the bound."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(compressed, _MOST_INFLATED)
    except zlib.error:
        return None
    return content if stream.eof else None
