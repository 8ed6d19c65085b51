import hashlib
import io
import struct
import threading
import warnings
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, UnidentifiedImageError

from tests.vflowopt import picture_files
from vflowopt.media.picture import FORMATS, Picture, PictureError, PictureLimits

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def refused(data: bytes, limits: PictureLimits | None = None) -> PictureError:
    with pytest.raises(PictureError) as caught:
        Picture.decode(data, limits)
    return caught.value


def corner(picture: Picture) -> tuple[int, ...]:
    return tuple(picture.pixels[0, 0].tolist())


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_as_they_were(form: str) -> None:
    data = encoded(noise(), form)
    picture = Picture.decode(data)
    np.testing.assert_array_equal(picture.pixels, np.asarray(noise()))
    assert (picture.width, picture.height) == (24, 16)
    assert picture.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("form", FORMATS)
def test_every_accepted_format_is_read(form: str) -> None:
    picture = Picture.decode(encoded(Image.new("RGB", (9, 7), RED), form))
    assert picture.pixels.shape == (7, 9, 3)
    assert np.abs(picture.pixels.astype(int) - RED).max() <= 8


def test_pixels_cannot_be_changed() -> None:
    picture = Picture.decode(encoded(noise()))
    with pytest.raises(ValueError, match="read-only"):
        picture.pixels[0, 0, 0] = 1


def test_no_bytes() -> None:
    assert refused(b"").reason == "PICTURE_EMPTY"


@pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"\0" * 100, encoded(Image.new("RGB", (4, 4)), "PPM")])
def test_not_an_accepted_image(data: bytes) -> None:
    error = refused(data)
    assert error.reason == "PICTURE_NOT_AN_IMAGE"
    assert "PNG" in error.metadata["formats"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated(form: str, share: float) -> None:
    data = encoded(noise(64, 64), form)
    error = refused(data[: int(len(data) * share)])
    assert error.reason == "PICTURE_TRUNCATED"
    assert "0x" not in str(error)  # no addresses of Python objects


def test_too_many_bytes() -> None:
    data = encoded(noise())
    error = refused(data, PictureLimits(max_bytes=len(data) - 1))
    assert error.reason == "PICTURE_TOO_LARGE"
    assert error.metadata == {"bytes": str(len(data)), "max_bytes": str(len(data) - 1)}
    assert Picture.decode(data, PictureLimits(max_bytes=len(data))).width == 24


@pytest.mark.parametrize(("width", "height"), [(8_000, 8_000), (10_000, 10_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    guard = Image.MAX_IMAGE_PIXELS
    assert refused(png(width, height)).reason == "PICTURE_TOO_MANY_PIXELS"
    assert Image.MAX_IMAGE_PIXELS == guard


def test_the_pixel_limit_is_inclusive() -> None:
    data = encoded(noise(20, 10))
    assert Picture.decode(data, PictureLimits(max_pixels=200)).width == 20
    error = refused(data, PictureLimits(max_pixels=199))
    assert error.metadata == {"width": "20", "height": "10", "max_pixels": "199"}


def test_a_picture_without_pixels() -> None:
    empty_gif = b"GIF89a" + struct.pack("<HH", 0, 0) + b"\0\0\0;"
    for data in (png(0, 0), png(5, 0), empty_gif):
        error = refused(data)
        assert error.reason == "PICTURE_TRUNCATED"
        assert "no pixels" in str(error)
    with pytest.raises(PictureError) as caught:
        Picture.from_pixels(np.zeros((0, 0, 3), dtype=np.uint8))
    assert caught.value.reason == "PICTURE_TOO_SMALL"


def test_a_single_pixel() -> None:
    assert corner(Picture.decode(encoded(Image.new("RGB", (1, 1), BLUE)))) == BLUE


def test_too_narrow() -> None:
    for size in ((20_000, 1), (1, 20_000), (201, 1)):
        assert refused(encoded(Image.new("RGB", size))).reason == "PICTURE_TOO_NARROW"
    assert Picture.decode(encoded(Image.new("RGB", (200, 1)))).width == 200


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_pixels": -1}, {"max_aspect": 0}])
def test_limits_check_themselves(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PictureLimits(**limits)


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"),
        (Image.new("RGB", (4, 4), RED).convert("P"), "PNG"),
        (Image.new("RGB", (4, 4), RED).convert("P"), "GIF"),
    ],
)
def test_colour_modes_turn_into_rgb(image: Image.Image, form: str) -> None:
    assert np.abs(np.asarray(corner(Picture.decode(encoded(image, form)))) - RED).max() <= 2


def test_one_bit() -> None:
    picture = Picture.decode(encoded(Image.fromarray(np.array([[True, False]]))))
    assert picture.pixels[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (3, 3), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (3, 3), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (3, 3), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("LA", (3, 3), (0, 0)), WHITE),
        (Image.new("LA", (3, 3), (0, 255)), (0, 0, 0)),
    ],
)
def test_alpha_is_flattened_on_white(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert corner(Picture.decode(encoded(image))) == expected


def test_transparent_colours_are_flattened_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    assert Picture.decode(encoded(palette, transparency=0)).pixels[0].tolist() == [list(WHITE), list(BLUE)]
    assert Picture.decode(encoded(palette, transparency=b"\xff\x00")).pixels[0].tolist() == [list(RED), list(WHITE)]
    plain = Image.new("RGB", (2, 1), RED)
    assert corner(Picture.decode(encoded(plain, transparency=RED))) == WHITE
    grey = Image.new("L", (2, 1), 10)
    assert corner(Picture.decode(encoded(grey, transparency=10))) == WHITE


@pytest.mark.parametrize(
    ("values", "form", "expected"),
    [
        (np.array([[0, 257, 32896, 65535]], dtype=np.uint16), "PNG", [0, 1, 128, 255]),
        (np.array([[0, 300, 32896, 65535]], dtype=np.uint16), "TIFF", [0, 1, 128, 255]),
        (np.array([[0, 16, 255]], dtype=np.int32), "TIFF", [0, 16, 255]),
        (np.array([[0, 32896, 65535]], dtype=np.int32), "TIFF", [0, 128, 255]),
        (np.array([[-100, 0, 100]], dtype=np.int32), "TIFF", [0, 128, 255]),
        (np.array([[70_000, 70_000]], dtype=np.int32), "TIFF", [0, 0]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), "TIFF", [0, 128, 255]),
        (np.array([[0.0, 0.25]], dtype=np.float32), "TIFF", [0, 64]),
        (np.array([[0.0, 128.0, 200.0]], dtype=np.float32), "TIFF", [0, 128, 200]),
        (np.array([[-3.4e38, 0.0, 3.4e38]], dtype=np.float32), "TIFF", [0, 128, 255]),
        (np.array([[np.nan, np.inf, 1.0]], dtype=np.float32), "TIFF", [0, 0, 255]),
    ],
)
def test_wide_greys_are_scaled_not_clipped(values: npt.NDArray[np.generic], form: str, expected: list[int]) -> None:
    picture = Picture.decode(encoded(Image.fromarray(values), form))
    assert picture.pixels[0].tolist() == [[grey] * 3 for grey in expected]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options: dict[str, object] = {"save_all": True, "append_images": frames[1:], "duration": 100}
    if form == "WEBP":
        options["lossless"] = True
    data = encoded(frames[0], form, **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert corner(Picture.decode(data)) == RED


QUADRANTS = np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((8, 16), dtype=np.uint8))
AS_STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright.T, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, object] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "AVIF": {"quality": 100}}.get(
        form, {}
    )
    stored = Image.fromarray(np.ascontiguousarray(AS_STORED[orientation](QUADRANTS))).convert("RGB")
    picture = Picture.decode(encoded(stored, form, exif=exif, **options))
    assert (picture.width, picture.height) == (32, 16)
    assert np.abs(picture.pixels[:, :, 0].astype(int) - QUADRANTS).max() <= 8


XMP_FORMS = [
    {"form": "attribute"},
    {"form": "quoted once"},
    {"form": "element"},
    {"form": "attribute", "prefix": "t"},
    {"form": "element", "prefix": "t"},
]


def with_xmp(image: Image.Image, form: str, packet: bytes) -> bytes:
    if form == "PNG":
        plain = encoded(image)
        text = picture_files.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)
        return plain[:33] + text + plain[33:]
    options = {"JPEG": {"xmp": packet}, "WEBP": {"xmp": packet, "lossless": True}, "TIFF": {"tiffinfo": {700: packet}}}
    return encoded(image, form, **options[form])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("style", XMP_FORMS, ids=lambda style: " ".join(style.values()))
def test_the_orientation_of_xmp_is_followed_where_exif_names_none(form: str, style: dict[str, str]) -> None:
    stored = Image.fromarray(np.ascontiguousarray(AS_STORED[6](QUADRANTS))).convert("RGB")
    picture = Picture.decode(with_xmp(stored, form, picture_files.xmp(6, **style)))
    assert np.abs(picture.pixels[:, :, 0].astype(int) - QUADRANTS).max() <= 8


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("style", XMP_FORMS[:3], ids=lambda style: style["form"])
def test_exif_goes_before_xmp(form: str, style: dict[str, str]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    if form == "TIFF":
        exif[ExifTags.Base.XMLPacket] = picture_files.xmp(6, **style)
    stored = Image.fromarray(np.ascontiguousarray(AS_STORED[3](QUADRANTS))).convert("RGB")
    packet = picture_files.xmp(6, **style)
    options: dict[str, object] = {"exif": exif, "lossless": True} if form == "WEBP" else {"exif": exif}
    data = encoded(stored, form, **options, **({"xmp": packet} if form in ("JPEG", "WEBP") else {}))
    if form == "PNG":
        data = data[:33] + picture_files.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet) + data[33:]
    assert np.abs(Picture.decode(data).pixels[:, :, 0].astype(int) - QUADRANTS).max() <= 8


def test_what_imagemagick_puts_into_texts_of_png_is_followed() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.fromarray(np.ascontiguousarray(AS_STORED[6](QUADRANTS))).convert("RGB")
    plain = encoded(stored)
    for name, content in ((b"exif", exif.tobytes()), (b"xmp", picture_files.xmp(6))):
        text = b"\n%s\n%8d\n%s\n" % (name, len(content), content.hex().encode())
        chunk = picture_files.chunk(b"zTXt", b"Raw profile type " + name + b"\0\0" + zlib.compress(text))
        for data in (plain[:33] + chunk + plain[33:], plain[:-12] + chunk + plain[-12:]):
            np.testing.assert_array_equal(Picture.decode(data).pixels[:, :, 0], QUADRANTS)


SHORT, LONG = 3, 4


@pytest.mark.parametrize(
    ("kind", "count", "value", "turned"),
    [
        (SHORT, 1, b"\6\0", True),
        (LONG, 1, b"\6\0\0\0", True),
        (SHORT, 1, b"\0\0", False),
        (SHORT, 1, b"\x09\0", False),
        (SHORT, 2, b"\6\0\3\0", True),
        (2, 2, b"6\0", False),
        (5, 1, b"\0\0\0\x99", False),
        (7, 1, b"\6", False),
        (11, 1, struct.pack("<f", 6.0), False),
        (99, 1, b"\6", False),
    ],
)
def test_an_orientation_counts_if_it_is_a_number_from_1_to_8(kind: int, count: int, value: bytes, turned: bool) -> None:
    entry = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    exif = b"II*\0\x08\0\0\0\1\0" + entry + b"\0\0\0\0"
    for data in (
        encoded(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0" + exif),
        encoded(Image.new("RGB", (8, 4)), "WEBP", exif=exif),
        encoded(Image.new("RGB", (8, 4)), "PNG", exif=exif),
    ):
        assert Picture.decode(data).width == (4 if turned else 8)


def test_broken_metadata_does_not_spoil_a_picture() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        assert Picture.decode(encoded(Image.new("RGB", (8, 4), RED), "JPEG", exif=exif)).width == 8


def test_an_unknown_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 99
    assert Picture.decode(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).width == 8


SAMPLES = [
    *(encoded(noise(20, 12), form) for form in FORMATS),
    encoded(noise(20, 12), "JPEG", progressive=True),
    encoded(noise(20, 12).convert("P"), "PNG", transparency=3),
    encoded(noise(20, 12), "TIFF", compression="tiff_lzw"),
    encoded(Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20)), "TIFF"),
    encoded(noise(20, 12), "GIF", save_all=True, append_images=[noise(20, 12).rotate(180)]),
]


@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=12),
    st.integers(0, 200) | st.just(0),
)
def test_damaged_bytes_end_in_a_picture_or_in_a_picture_error(
    sample: bytes, edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(sample)
    for place, value in edits:
        # Headers are short and matter most: half of the edits go there.
        data[place % len(data) if place % 2 else place % min(len(data), 80)] = value
    limits = PictureLimits(max_pixels=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            picture = Picture.decode(bytes(data[: len(data) - cut]), limits)
        except PictureError as error:
            assert error.reason.startswith("PICTURE_")
            assert str(error)
        else:
            assert picture.pixels.dtype == np.uint8
            assert 0 < picture.width * picture.height <= 10_000


@given(st.binary(max_size=200))
def test_foreign_bytes_end_in_a_picture_error(data: bytes) -> None:
    assert refused(data).reason.startswith("PICTURE_")


def test_decoding_in_threads_warns_of_nothing_and_leaves_the_filters_alone() -> None:
    # The bits per sample are claimed to lie beyond the end of the file: of that, Pillow warns.
    data = bytearray(encoded(noise(64, 64), "TIFF"))
    entry = data.index(struct.pack("<HHI", 258, 3, 3))
    data[entry + 8 : entry + 12] = struct.pack("<I", len(data))

    def work() -> None:
        for _ in range(30):
            refused(bytes(data))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(data))
        assert caught
        caught.clear()
        filters = list(warnings.filters)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not caught
        assert warnings.filters == filters


def test_from_pixels() -> None:
    pixels = np.asarray(noise())
    picture = Picture.from_pixels(pixels)
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.digest == Picture.from_pixels(pixels.copy()).digest
    assert picture.digest != Picture.from_pixels(pixels.reshape(24, 16, 3)).digest
    mirrored = Picture.from_pixels(pixels[:, ::-1])
    assert mirrored.pixels.flags.c_contiguous


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((3,), np.uint8)]
)
def test_from_pixels_refuses_other_arrays(pixels: npt.NDArray[np.generic]) -> None:
    with pytest.raises(PictureError, match="uint8"):
        Picture.from_pixels(pixels)


def test_from_pixels_keeps_to_the_limits() -> None:
    with pytest.raises(PictureError) as caught:
        Picture.from_pixels(np.zeros((300, 1, 3), np.uint8))
    assert caught.value.reason == "PICTURE_TOO_NARROW"
