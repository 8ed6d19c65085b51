"""The lines of the tables in docs/reference/pictures.md: for each, files and what must be read from them.

The values are worked out by hand or by a formula, never by the library under test. They were compared with those of
ImageMagick 6.9 and tifffile when they were written down.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.vflowopt import picture_files as files
from tests.vflowopt.picture_files import chunk, encoded, png, tiff

BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
BLACK_TO_WHITE = [BLACK, (85, 85, 85), (170, 170, 170), WHITE]

Colours = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Read:
    """A file that is read.

    Attributes:
        data: the file.
        colours: the pixels, row by row.
        width: pixels of a row; all of them, if not given.
        within: how far a value may lie from the right one.
    """

    data: bytes
    colours: Colours
    width: int | None = None
    within: int = 0


@dataclass(frozen=True)
class Refused:
    """A file that is refused, with the reason and the metadata of the error."""

    data: bytes
    reason: str
    metadata: dict[str, str] = field(default_factory=dict)


def grey(*values: int) -> Colours:
    """Grey pixels."""
    return [(value, value, value) for value in values]


def samples(*values: int, kind: str = "uint8") -> npt.NDArray[np.generic]:
    """One row of samples, [1, n]."""
    return np.array([values], kind)


def colours(*values: tuple[int, ...], kind: str = "uint8") -> npt.NDArray[np.generic]:
    """One row of pixels of several samples, [1, n, samples]."""
    return np.array([values], kind)


def unsupported(data: bytes, form: str, mode: str) -> Refused:
    """A file of a kind that is not read."""
    return Refused(data, "PICTURE_UNSUPPORTED", {"format": form, "mode": mode})


def flat(colour: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    """An image of one colour, large enough for one block of a JPEG file."""
    return Image.new(mode, size, colour if len(colour) > 1 else colour[0])


# PNG

PALETTE = bytes([0, 0, 255, 255, 255, 0, 255, 0, 0, 0, 255, 0])
PALETTE_COLOURS = [BLUE, (255, 255, 0), RED, GREEN]


def trns(*values: int) -> bytes:
    """The transparent colour of a PNG file."""
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def apng(*, shown: bool) -> bytes:
    """An animation on 2 x 1 pixels: the first frame is red, the second green.

    Args:
        shown: whether the picture of the file is the first frame. If not, that picture is blue, and the first frame
            covers the right pixel alone.
    """

    def control(number: int, width: int, left: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">5I2H2B", number, width, 1, left, 0, 1, 10, 0, 0))

    def frame(number: int, *pixels: tuple[int, int, int]) -> bytes:
        return chunk(b"fdAT", struct.pack(">I", number) + files.png_pixels(colours(*pixels), 8))

    control_chunk = chunk(b"acTL", struct.pack(">II", 2, 0))
    if shown:
        after = control(1, 2, 0) + frame(2, GREEN, GREEN)
        return png(colours(RED, RED), 8, 2, control_chunk, control(0, 2, 0), after=after)
    after = control(0, 1, 1) + frame(1, RED) + control(2, 2, 0) + frame(3, GREEN, GREEN)
    return png(colours(BLUE, BLUE), 8, 2, control_chunk, after=after)


NOISE = np.random.default_rng(0).integers(0, 256, 1 << 21, dtype=np.uint8).tobytes()


def damaged(whole: bytes) -> bytes:
    """A chunk with a wrong checksum."""
    return whole[:-1] + bytes([whole[-1] ^ 1])


def compressed(content: bytes) -> bytes:
    """What follows the name in a compressed chunk."""
    return b"\0\0" + zlib.compress(content, 1)


PNG = {
    "PNG: grey of 1, 2, 4 or 8 bits": [
        Read(png(samples(0, 1), 1, 0), grey(0, 255)),
        Read(png(samples(0, 1, 2, 3), 2, 0), grey(0, 85, 170, 255)),
        Read(png(samples(0, 1, 7, 15), 4, 0), grey(0, 17, 119, 255)),
        Read(png(samples(0, 1, 200, 255), 8, 0), grey(0, 1, 200, 255)),
    ],
    "PNG: grey of 16 bits": [
        Read(png(samples(0, 257, 300, 32896, 65535, kind="uint16"), 16, 0), grey(0, 1, 1, 128, 255))
    ],
    "PNG: RGB of 8 or 16 bits": [
        Read(png(colours((1, 2, 3), (255, 0, 9)), 8, 2), [(1, 2, 3), (255, 0, 9)]),
        Read(png(colours((257, 514, 65535), kind="uint16"), 16, 2), [(1, 2, 255)], within=1),
    ],
    "PNG: palette of 1, 2, 4 or 8 bits": [
        Read(png(samples(0, 1), 1, 3, chunk(b"PLTE", PALETTE)), PALETTE_COLOURS[:2]),
        *(Read(png(samples(0, 1, 2, 3), bits, 3, chunk(b"PLTE", PALETTE)), PALETTE_COLOURS) for bits in (2, 4, 8)),
    ],
    "PNG: alpha of 8 or 16 bits": [
        Read(png(colours((100, 51), (7, 0), (7, 255)), 8, 4), grey(224, 255, 7)),
        Read(png(colours((100 * 257, 51 * 257), (7, 0), kind="uint16"), 16, 4), grey(224, 255)),
        Read(png(colours((100, 0, 0, 51), (7, 0, 0, 0)), 8, 6), [(224, 204, 204), WHITE]),
        Read(png(colours((25700, 0, 0, 51 * 257), (7, 0, 0, 0), kind="uint16"), 16, 6), [(224, 204, 204), WHITE]),
    ],
    "PNG: transparent grey": [
        Read(png(samples(0, 1), 1, 0, trns(0)), grey(255, 255)),
        Read(png(samples(0, 1, 2, 3), 2, 0, trns(1)), grey(0, 255, 170, 255)),
        Read(png(samples(3, 7, 15), 4, 0, trns(3)), grey(255, 119, 255)),
        Read(png(samples(3, 7, 15), 4, 0, trns(0xFFF3)), grey(255, 119, 255)),
        Read(png(samples(10, 11), 8, 0, trns(10)), grey(255, 11)),
        Read(png(samples(0x1234, 0x1235, kind="uint16"), 16, 0, trns(0x1234)), grey(255, 18)),
    ],
    "PNG: transparent RGB": [
        Read(png(colours((1, 2, 3), (1, 2, 4)), 8, 2, trns(1, 2, 3)), [WHITE, (1, 2, 4)]),
        Read(
            png(
                colours((0xABCD, 0x1234, 0x5678), (0xABCD, 0x1234, 0x5679), kind="uint16"),
                16,
                2,
                trns(0xABCD, 0x1234, 0x5678),
            ),
            [WHITE, (0xAB, 0x12, 0x56)],
            within=1,
        ),
    ],
    "PNG: transparent entries of the palette": [
        Read(
            png(samples(0, 1, 2, 3), bits, 3, chunk(b"PLTE", PALETTE), chunk(b"tRNS", bytes([0, 51, 255]))),
            [WHITE, (255, 255, 204), RED, GREEN],
        )
        for bits in (2, 4, 8)
    ],
    "PNG: a profile or text of any size, or a broken one": [
        Read(png(samples(9), 8, 0, each), grey(9))
        for each in (
            chunk(b"iCCP", b"noise" + compressed(NOISE)),
            chunk(b"iCCP", b"zeros" + compressed(bytes(1 << 26))),
            chunk(b"iCCP", b"noise"),
            chunk(b"zTXt", b"comment" + compressed(NOISE)),
            chunk(b"iTXt", b"comment\0\1\0\0\0" + compressed(NOISE)[2:]),
            chunk(b"tEXt", b"comment\0" + NOISE),
            chunk(b"tEXt", b"transparency\0none"),
            damaged(chunk(b"tEXt", b"comment\0none")),
            chunk(b"gAMA", b"\0"),
            chunk(b"eXIf", b"none"),
        )
    ]
    + [Read(png(samples(9), 8, 0, after=chunk(b"zTXt", b"comment" + compressed(NOISE))), grey(9))],
    "PNG: animated": [Read(apng(shown=True), [RED, RED]), Read(apng(shown=False), [WHITE, RED])],
    "PNG: for Apple's phones (CgBI)": [
        unsupported(b"\x89PNG\r\n\x1a\n" + chunk(b"CgBI", b"\x50\0\x20\2") + png(samples(1), 8, 0)[8:], "PNG", "CgBI")
    ],
}

# JPEG

PHOTO = Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((70, 50), 2)


def adobe(jpeg: bytes, keep: bool) -> bytes:
    """A JPEG file with its Adobe segment, or without."""
    at = jpeg.index(b"\xff\xee")
    return jpeg if keep else jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def with_frame_header(jpeg: bytes, marker: int | None = None, precision: int | None = None) -> bytes:
    """A JPEG file whose frame header claims another process, or another precision."""
    at = jpeg.index(b"\xff\xc0")
    changed = bytearray(jpeg)
    changed[at + 1] = marker or changed[at + 1]
    changed[at + 4] = precision or changed[at + 4]
    return bytes(changed)


def with_height(jpeg: bytes, height: int) -> bytes:
    """A JPEG file whose frame header claims another height."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + struct.pack(">H", height) + jpeg[at + 7 :]


JPEG_RED = encoded(flat(RED), "JPEG", quality=95)
CMYK_RED = encoded(flat((0, 255, 255, 0), "CMYK"), "JPEG", quality=98)

JPEG = {
    "JPEG: grey and colour, baseline and progressive": [
        Read(encoded(flat((77,), "L"), "JPEG"), grey(77) * 256, 16, within=1),
        Read(JPEG_RED, [RED] * 256, 16, within=2),
        Read(encoded(flat(RED), "JPEG", quality=95, progressive=True), [RED] * 256, 16, within=2),
    ],
    "JPEG: CMYK and YCCK": [
        Read(CMYK_RED, [RED] * 256, 16, within=3),
        Read(encoded(flat((255, 0, 0, 51), "CMYK"), "JPEG", quality=98), [(0, 204, 204)] * 256, 16, within=3),
        Read(adobe(encoded(flat((255, 255, 255, 0), "CMYK"), "JPEG"), keep=False), [BLACK] * 256, 16, within=3),
    ],
    "JPEG: all but the end marker": [
        Read(JPEG_RED[:-2], [RED] * 256, 16, within=2),
        Read(JPEG_RED[:-1], [RED] * 256, 16, within=2),
        Read(JPEG_RED[:-2] + bytes(512), [RED] * 256, 16, within=2),
        Read(encoded(flat(RED), "JPEG", quality=95, progressive=True)[:-2], [RED] * 256, 16, within=2),
    ],
    "JPEG: cut off": [
        Refused(encoded(PHOTO, "JPEG", **options)[:cut], "PICTURE_TRUNCATED", {"format": "JPEG"})
        for options in ({}, {"progressive": True}, {"restart_marker_rows": 1})
        for cut in (200, -700, -100, -20, -5)
    ]
    + [
        Refused(whole[: whole.rindex(marker)], "PICTURE_TRUNCATED", {"format": "JPEG"})
        for whole, marker in (
            (encoded(flat(RED, size=(160, 120)), "JPEG", restart_marker_rows=1), b"\xff\xd5"),  # the last of six
            (encoded(PHOTO, "JPEG", progressive=True), b"\xff\xda"),  # the last scan
        )
    ],
    "JPEG: lossless, of 8 bits": [
        Read(files.lossless_jpeg([[10, 20, 30], [40, 250, 60]], 8), grey(10, 20, 30, 40, 250, 60), 3)
    ],
    "JPEG: lossless, of more bits": [
        unsupported(files.lossless_jpeg([[10, 20, 30]], bits), "JPEG", f"lossless, {bits}-bit") for bits in (12, 16)
    ],
    "JPEG: of 12 bits": [unsupported(with_frame_header(JPEG_RED, 0xC1, 12), "JPEG", "12-bit")],
    "JPEG: hierarchical": [unsupported(with_frame_header(JPEG_RED, 0xC5), "JPEG", "hierarchical")],
    "JPEG: height given behind the pixels (DNL)": [
        unsupported(with_height(JPEG_RED, 0), "JPEG", "height behind the pixels")
    ],
    "JPEG: several pictures (MPO)": [
        Read(
            encoded(flat(RED), "MPO", quality=95, save_all=True, append_images=[flat(BLUE)]), [RED] * 256, 16, within=2
        )
    ],
}

# WebP, GIF, AVIF


def webp(image: Image.Image, **options: object) -> bytes:
    """A lossless WebP file that keeps the colours of transparent pixels."""
    return encoded(image, "WEBP", lossless=True, exact=True, **options)


def gif(canvas: tuple[int, int], *frames: tuple[object, ...], **options: object) -> bytes:
    """A GIF file with the palette of these tests."""
    return files.gif(canvas, frames, palette=PALETTE, **options)  # type: ignore[arg-type]


LOCAL = bytes([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
WHOLE = ((0, 0, 2, 2), [0, 1, 2, 3], None, None)

OTHERS = {
    "WebP: lossy and lossless": [
        Read(webp(flat((1, 2, 3))), [(1, 2, 3)] * 256, 16),
        Read(encoded(flat((77, 77, 77)), "WEBP", quality=95), grey(77) * 256, 16, within=2),
    ],
    "WebP: alpha": [Read(webp(flat((100, 0, 0, 51), "RGBA")), [(224, 204, 204)] * 256, 16)],
    "WebP: animated": [Read(webp(flat(RED), save_all=True, append_images=[flat(BLUE)]), [RED] * 256, 16)],
    "GIF: palette of the file or of the frame": [
        Read(gif((2, 2), WHOLE), PALETTE_COLOURS, 2),
        Read(
            gif((2, 2), ((0, 0, 2, 2), [0, 1, 2, 3], LOCAL, None)), [(1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)], 2
        ),
    ],
    "GIF: transparent entry": [
        Read(gif((2, 2), ((0, 0, 2, 2), [0, 1, 2, 3], None, 2)), [BLUE, (255, 255, 0), WHITE, GREEN], 2),
        Read(
            files.gif(
                (2, 2), [((0, 0, 2, 2), [0, 1, 2, 3], None, 2)], palette=bytes([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
            ),
            grey(0, 1, 255, 3),
            2,
        ),
    ],
    "GIF: first frame smaller than the canvas": [
        Read(
            gif((3, 2), ((1, 1, 1, 1), [1], None, transparent), WHOLE, background=2, disposal=disposal),
            [*[WHITE] * 4, (255, 255, 0), WHITE],
            3,
        )
        for disposal in range(4)
        for transparent in (None, 0)
    ],
    "GIF: first frame beyond the canvas": [
        Read(gif((1, 1), ((1, 0, 1, 1), [2], None, None)), [WHITE, RED]),
    ],
    "GIF: animated": [Read(gif((2, 2), WHOLE, ((0, 0, 2, 2), [3] * 4, None, None)), PALETTE_COLOURS, 2)],
    "AVIF: with and without alpha": [
        Read(encoded(flat(RED), "AVIF", quality=100, subsampling="4:4:4"), [RED] * 256, 16, within=3),
        Read(
            encoded(flat((255, 0, 0, 51), "RGBA"), "AVIF", quality=100, subsampling="4:4:4"),
            [(255, 204, 204)] * 256,
            16,
            within=3,
        ),
    ],
    "AVIF: animated": [
        Read(
            encoded(flat(RED), "AVIF", quality=100, subsampling="4:4:4", save_all=True, append_images=[flat(BLUE)]),
            [RED] * 256,
            16,
            within=3,
        )
    ],
}

# BMP

BMP_ROWS = bytes([0, 0, 255, 51, 0, 255, 0, 0, 255, 0, 0, 255, 9, 8, 7, 0])  # BGRA, the lower row first
BMP_COLOURS = [BLUE, (7, 8, 9), RED, GREEN]
OPAQUE_ROWS = bytes(0 if place % 4 == 3 else value for place, value in enumerate(BMP_ROWS))
MASKS = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
BMP_PALETTE = bytes([0, 0, 255, 0, 0, 255, 0, 0])


def indexed(rows: bytes, bits: int, compression: int = 0) -> bytes:
    """A BMP file of 2 x 2 pixels; entry 0 is red, entry 1 green."""
    return files.bmp(rows, 2, 2, bits, compression=compression, palette=BMP_PALETTE.ljust(4 << bits, b"\0"))


BMP = {
    "BMP: palette of 1, 4 or 8 bits": [
        Read(indexed(bytes([0x40, 0, 0, 0, 0xC0, 0, 0, 0]), 1), [GREEN, GREEN, RED, GREEN], 2),
        Read(indexed(bytes([0x01, 0, 0, 0, 0x11, 0, 0, 0]), 4), [GREEN, GREEN, RED, GREEN], 2),
        Read(indexed(bytes([0, 1, 0, 0, 1, 1, 0, 0]), 8), [GREEN, GREEN, RED, GREEN], 2),
    ],
    "BMP: run lengths of 4 or 8 bits": [
        Read(indexed(bytes([2, 0x01, 0, 0, 2, 0x10, 0, 1]), 4, 2), [GREEN, RED, RED, GREEN], 2),
        Read(indexed(bytes([2, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1]), 8, 1), [RED, GREEN, GREEN, GREEN], 2),
        Read(indexed(bytes([0, 2, 1, 1, 1, 1, 0, 1]), 8, 1), [RED, GREEN, RED, RED], 2),
        Read(indexed(bytes([0, 0, 2, 1, 0, 1]), 8, 1), [GREEN, GREEN, RED, RED], 2),
        Read(indexed(bytes([2, 1, 0, 1]), 8, 1), [RED, RED, GREEN, GREEN], 2),
        Read(
            files.bmp(bytes([0, 3, 1, 0, 1, 0, 0, 1]), 3, 1, 8, compression=1, palette=BMP_PALETTE.ljust(1024, b"\0")),
            [GREEN, RED, GREEN],
        ),
        Refused(indexed(bytes([2, 1, 0, 0]), 8, 1), "PICTURE_TRUNCATED", {"format": "BMP"}),
    ],
    "BMP: 16 bits (555, 565)": [
        Read(
            files.bmp(struct.pack("<4H", 0x7C00, 0x3E0, 0x1F, 0x4210), 2, 2, 16),
            [BLUE, (131, 131, 131), RED, GREEN],
            2,
            within=1,
        ),
        Read(
            files.bmp(struct.pack("<2H", 0xF800, 0x8410), 2, 1, 16, compression=3, masks=(0xF800, 0x7E0, 0x1F)),
            [RED, (131, 129, 131)],
            within=1,
        ),
    ],
    "BMP: 24 bits, from the bottom up or from the top down": [
        Read(files.bmp(bytes([1, 2, 3, 0, 4, 5, 6, 0]), 1, 2, 24), [(6, 5, 4), (3, 2, 1)], 1),
        Read(files.bmp(bytes([1, 2, 3, 0, 4, 5, 6, 0]), 1, -2, 24), [(3, 2, 1), (6, 5, 4)], 1),
        Read(files.bmp(bytes([1, 2, 3, 0, 4, 5, 6, 0]), 1, 2, 24, header=12), [(6, 5, 4), (3, 2, 1)], 1),
    ],
    "BMP: 32 bits without a mask for alpha": [
        Read(files.bmp(BMP_ROWS, 2, 2, 32), BMP_COLOURS, 2),
        Read(files.bmp(BMP_ROWS, 2, 2, 32, compression=3, masks=MASKS[:3]), BMP_COLOURS, 2),
        Read(files.bmp(BMP_ROWS, 2, 2, 32, header=124), BMP_COLOURS, 2),
    ],
    "BMP: 32 bits with a mask for alpha (V3, V4, V5)": [
        Read(
            files.bmp(BMP_ROWS, 2, 2, 32, header=header, compression=3, masks=MASKS),
            [BLUE, WHITE, (255, 204, 204), WHITE],
            2,
        )
        for header in (56, 108, 124)
    ],
    "BMP: 32 bits, alpha 0 everywhere": [
        Read(files.bmp(OPAQUE_ROWS, 2, 2, 32, header=header, compression=3, masks=MASKS), BMP_COLOURS, 2)
        for header in (56, 108, 124)
    ],
    "BMP: other depths, masks and compressions": [
        unsupported(
            files.bmp(bytes(8), 2, 2, 16, compression=3, masks=(0xF00, 0xF0, 0xF)), "BMP", "16-bit, unusual bit fields"
        ),
        unsupported(files.bmp(bytes(8), 2, 2, 2, palette=bytes(16)), "BMP", "2-bit"),
        unsupported(files.bmp(bytes(32), 2, 2, 64), "BMP", "64-bit"),
        unsupported(files.bmp(bytes(32), 2, 2, 0, compression=4), "BMP", "0-bit, JPEG inside"),
    ],
}

# TIFF

ORDERS = ("<", ">")
COLOUR_MAP = [value * 257 for place in range(3) for value in PALETTE.ljust(768, b"\0")[place::3]]
SIGNED, FLOAT = {339: [2]}, {339: [3]}
EXTRA = [{338: [kind]} for kind in range(3)]
TILED = np.arange(16 * 32, dtype=np.uint16).reshape(16, 32).astype(np.uint8)
GREY_OF_TIFF = {
    1: ([0, 1], grey(0, 255)),
    2: ([0, 1, 3], grey(0, 85, 255)),
    4: ([0, 1, 15], grey(0, 17, 255)),
    8: ([0, 16, 255], grey(0, 16, 255)),
    16: ([0, 300, 32896, 65535], grey(0, 1, 128, 255)),
}


def negative(pixels: Colours) -> Colours:
    """Black and white exchanged."""
    return [(255 - red, 255 - green, 255 - blue) for red, green, blue in pixels]


def of_bits(values: list[int], bits: int) -> npt.NDArray[np.generic]:
    """A row of unsigned samples."""
    return samples(*values, kind="uint16" if bits > 8 else "uint8")


def each_order(
    values: npt.NDArray[np.generic], bits: int, photometric: int, pixels: Colours, **options: object
) -> list[Read]:
    """The same picture in both byte orders."""
    return [Read(tiff(values, bits, photometric, order=order, **options), pixels) for order in ORDERS]  # type: ignore[arg-type]


def deflated(data: bytes) -> bytes:
    """A TIFF file of one strip, compressed."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    entries = [start + 2 + 12 * number for number in range(count)]
    tags = {struct.unpack_from(order + "H", data, at)[0]: at for at in entries}
    (length,) = struct.unpack_from(order + "I", data, tags[279] + 8)
    strip = zlib.compress(data[8 : 8 + length])
    changed = bytearray(data)
    struct.pack_into(order + "H", changed, tags[259] + 8, 8)
    struct.pack_into(order + "I", changed, tags[273] + 8, len(changed))
    struct.pack_into(order + "I", changed, tags[279] + 8, len(strip))
    return bytes(changed) + strip


PLANES = colours((0, 100, 200), (255, 3, 9))
PLANES_OF_16 = (PLANES.astype(np.uint16) * 256 + 77).astype(np.uint16)

TIFF = {
    "TIFF: grey of 1, 2, 4, 8 or 16 bits": [
        read
        for bits, (values, pixels) in GREY_OF_TIFF.items()
        for read in each_order(of_bits(values, bits), bits, 1, pixels)
    ],
    "TIFF: grey, white is zero": [
        read
        for bits, (values, pixels) in GREY_OF_TIFF.items()
        for read in each_order(of_bits(values, bits), bits, 0, negative(pixels))
    ],
    "TIFF: grey of 12 bits": [
        Read(tiff(samples(0, 16, 2048, 4095, kind="uint16"), 12, 1), grey(0, 1, 128, 255)),
        Read(tiff(samples(0, 16, 4095, kind="uint16"), 12, 1), grey(0, 1, 255)),
        Read(tiff(samples(0, 16, 2048, 4095, kind="uint16"), 12, 0), grey(255, 254, 127, 0)),
        unsupported(tiff(samples(0, 4095, kind="uint16"), 12, 1, order=">"), "TIFF", "grey, 12-bit unsigned"),
    ],
    "TIFF: grey of 32 bits": [
        Read(tiff(samples(0, 16, 255, kind="uint32"), 32, 1), grey(0, 16, 255)),
        Read(tiff(samples(0, 32896, 65535, kind="uint32"), 32, 1), grey(0, 128, 255)),
        Read(tiff(samples(0, 2**31, 2**32 - 1, kind="uint32"), 32, 1), grey(0, 128, 255)),
        unsupported(tiff(samples(0, 9, kind="uint32"), 32, 1, order=">"), "TIFF", "grey, 32-bit unsigned"),
    ],
    "TIFF: signed grey of 8, 16 or 32 bits": [
        *each_order(samples(-128, 0, 127, kind="int8"), 8, 1, grey(0, 128, 255), tags=SIGNED),
        *each_order(samples(0, 127, kind="int8"), 8, 1, grey(0, 255), tags=SIGNED),
        *each_order(samples(-100, 0, 100, kind="int16"), 16, 1, grey(0, 128, 255), tags=SIGNED),
        *each_order(samples(0, 300, 32767, kind="int16"), 16, 1, grey(0, 2, 255), tags=SIGNED),
        *each_order(samples(-100, 0, 100, kind="int32"), 32, 1, grey(0, 128, 255), tags=SIGNED),
        *each_order(samples(0, 32767, kind="int16"), 16, 0, grey(255, 0), tags=SIGNED),
    ],
    "TIFF: floating-point grey of 32 bits": [
        *each_order(np.array([[0, 0.25, 1]], "float32"), 32, 1, grey(0, 64, 255), tags=FLOAT),
        *each_order(np.array([[0, 0.25, 1]], "float32"), 32, 0, grey(255, 191, 0), tags=FLOAT),
        *each_order(np.array([[0, 128, 200]], "float32"), 32, 1, grey(0, 128, 200), tags=FLOAT),
        *each_order(np.array([[-2, 0, 2]], "float32"), 32, 1, grey(0, 128, 255), tags=FLOAT),
        *each_order(np.array([[np.nan, np.inf, 1]], "float32"), 32, 1, grey(0, 0, 255), tags=FLOAT),
    ],
    "TIFF: compressed, in both byte orders": [
        Read(deflated(tiff(values, bits, photometric, order=order, tags=tags)), pixels)
        for order in ORDERS
        for values, bits, photometric, tags, pixels in (
            (samples(0, 300, 65535, kind="uint16"), 16, 1, {}, grey(0, 1, 255)),
            (samples(0, 300, 65535, kind="uint16"), 16, 0, {}, grey(255, 254, 0)),
            (samples(-100, 0, 100, kind="int16"), 16, 1, SIGNED, grey(0, 128, 255)),
            (samples(-100, 0, 100, kind="int32"), 32, 1, SIGNED, grey(0, 128, 255)),
            (np.array([[0, 0.25, 1]], "float32"), 32, 1, FLOAT, grey(0, 64, 255)),
            (PLANES, 8, 2, {}, [(0, 100, 200), (255, 3, 9)]),
            (PLANES_OF_16, 16, 2, {}, [(0, 100, 200), (255, 3, 9)]),
        )
    ],
    "TIFF: RGB of 8 or 16 bits": [
        *each_order(PLANES, 8, 2, [(0, 100, 200), (255, 3, 9)]),
        *each_order(PLANES_OF_16, 16, 2, [(0, 100, 200), (255, 3, 9)]),
    ],
    "TIFF: RGB in planes": [
        *(
            Read(
                tiff(
                    PLANES, 8, 2, order=order, tags={284: [2]}, parts=[PLANES[..., band].tobytes() for band in range(3)]
                ),
                [(0, 100, 200), (255, 3, 9)],
            )
            for order in ORDERS
        ),
        *(
            Read(
                tiff(
                    PLANES_OF_16,
                    16,
                    2,
                    order=order,
                    tags={284: [2]},
                    parts=[files.packed(PLANES_OF_16[..., band], 16, order) for band in range(3)],
                ),
                [(0, 100, 200), (255, 3, 9)],
            )
            for order in ORDERS
        ),
        *each_order(samples(0, 16, 255), 8, 0, grey(255, 239, 0), tags={284: [2]}),
    ],
    "TIFF: other colours in planes": [
        unsupported(
            tiff(colours((9, 9)), 8, 1, tags={284: [2], 338: [1]}, parts=[b"\x09", b"\x09"]),
            "TIFF",
            "planes of grey, 8-bit",
        ),
        unsupported(
            tiff(colours((9, 9, 9)), 8, 8, tags={284: [2]}, parts=[b"\x09"] * 3), "TIFF", "planes of CIE L*a*b*, 8-bit"
        ),
    ],
    "TIFF: palette": [
        *each_order(samples(0, 1, 2, 3), 8, 3, PALETTE_COLOURS, tags={320: COLOUR_MAP}),
        *each_order(samples(0, 1, 2, 3), 8, 3, PALETTE_COLOURS, tags={320: [value // 257 for value in COLOUR_MAP]}),
        *each_order(colours((0, 255), (2, 51)), 8, 3, [BLUE, (255, 204, 204)], tags={320: COLOUR_MAP, 338: [2]}),
    ],
    "TIFF: alpha that the colours are multiplied with": [
        *each_order(colours((51, 51), (200, 255), (0, 0)), 8, 1, grey(255, 200, 255), tags=EXTRA[1]),
        *each_order(colours((51, 0, 0, 51), (10, 20, 30, 255)), 8, 2, [(255, 204, 204), (10, 20, 30)], tags=EXTRA[1]),
        *each_order(colours((51 * 257, 0, 0, 51 * 257), kind="uint16"), 16, 2, [(255, 204, 204)], tags=EXTRA[1]),
    ],
    "TIFF: alpha apart from the colours": [
        *each_order(colours((100, 51), (200, 255), (0, 0)), 8, 1, grey(224, 200, 255), tags=EXTRA[2]),
        *each_order(colours((100, 0, 0, 51), (10, 20, 30, 255)), 8, 2, [(224, 204, 204), (10, 20, 30)], tags=EXTRA[2]),
        *each_order(colours((25700, 0, 0, 51 * 257), kind="uint16"), 16, 2, [(224, 204, 204)], tags=EXTRA[2]),
    ],
    "TIFF: extra samples that are no alpha": [
        *each_order(colours((100, 51), (0, 0)), 8, 1, grey(100, 0), tags=EXTRA[0]),
        *each_order(colours((51, 0, 0, 51), (10, 20, 30, 255)), 8, 2, [(51, 0, 0), (10, 20, 30)], tags=EXTRA[0]),
    ],
    "TIFF: CMYK of 8 or 16 bits": [
        *each_order(colours((0, 255, 255, 0), (255, 0, 0, 51)), 8, 5, [RED, (0, 204, 204)]),
        *each_order(colours((0, 65535, 65535, 0), kind="uint16"), 16, 5, [RED]),
    ],
    "TIFF: YCbCr": [
        Read(
            tiff(colours((76, 85, 255), (150, 44, 21)), 8, 6, tags={530: [1, 1]}), [(254, 0, 0), (0, 255, 1)], within=1
        ),
        unsupported(
            tiff(np.zeros((2, 2, 3), np.uint8), 8, 6, parts=[bytes([76, 76, 76, 76, 85, 255])]),
            "TIFF",
            "YCbCr, subsampled without compression",
        ),
    ],
    "TIFF: CIE L*a*b* of 8 bits": [
        # The last is the red of sRGB, L* = 54.3, a* = 80.8, b* = 69.9 (D50), rounded to whole steps.
        Read(tiff(colours((255, 0, 0), (128, 0, 0), (138, 81, 70)), 8, 8), [WHITE, (119, 119, 119), RED], within=5)
    ],
    "TIFF: tiles": [
        Read(
            tiff(TILED, 8, 1, tags={322: [16], 323: [16]}, parts=[TILED[:, :16].tobytes(), TILED[:, 16:].tobytes()]),
            grey(*TILED.ravel().tolist()),
            32,
        )
    ],
    "TIFF: several pages": [Read(tiff(PLANES, 8, 2, next_page=True), [(0, 100, 200), (255, 3, 9)])],
    "TIFF: 64-bit offsets (BigTIFF)": [
        Read(tiff(PLANES, 8, 2, big=True), [(0, 100, 200), (255, 3, 9)]),
        unsupported(tiff(PLANES, 8, 2, big=True, order=">"), "TIFF", "BigTIFF, big-endian"),
    ],
    "TIFF: other samples": [
        unsupported(
            tiff(np.zeros((1, 1, 3), "float32"), 32, 2, tags={339: [3] * 3}), "TIFF", "RGB, 32/32/32-bit floating point"
        ),
        unsupported(tiff(np.zeros((1, 1), "float64"), 64, 1, tags=FLOAT), "TIFF", "grey, 64-bit floating point"),
        unsupported(tiff(np.zeros((1, 1), "uint64"), 64, 1), "TIFF", "grey, 64-bit unsigned"),
        unsupported(tiff(np.zeros((1, 1), "float16"), 16, 1, tags=FLOAT), "TIFF", "grey, 16-bit floating point"),
        unsupported(tiff(np.zeros((1, 1, 3), "uint8"), 8, 9), "TIFF", "ICC L*a*b*, 8/8/8-bit unsigned"),
        unsupported(tiff(PLANES, 8, 2, tags={259: [34712]}), "TIFF", "compression 34712"),
        unsupported(tiff(PLANES, 8, 2, tags={259: [50001]}), "TIFF", "compression webp"),
    ],
}

LINES: dict[str, list[Read | Refused]] = {**PNG, **JPEG, **OTHERS, **BMP, **TIFF}
