"""A PIL image arrives as the file of that image would: the service reads the same pixels from both."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image, ImageCms, ImageDraw

from tests.vflowopt.picture_files import chunk, gif, grey_profile, png, rgb_profile, tiff, xmp
from tests.vflowopt.picture_lines import LINES, PALETTE, Read
from vflow_client.image_source import to_image
from vflowopt.media.picture import Picture, PictureError

GREYS = np.array([[0, 60, 120], [180, 240, 255]], np.uint8)
P3 = rgb_profile(2.2, (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def pixels(data: bytes) -> list[object]:
    return Picture.decode(data).pixels.tolist()


def sent(picture: Image.Image) -> list[object]:
    """What the service reads of an image that a caller passes."""
    return pixels(to_image(picture).data)


def rgb(values: np.ndarray) -> list[object]:
    return np.repeat(values[..., None], 3, axis=-1).tolist() if values.ndim == 2 else values.tolist()


FILES = [
    pytest.param(case.data, id=f"{line} {number}")
    for line, cases in LINES.items()
    for number, case in enumerate(cases, 1)
    if isinstance(case, Read) and len(case.data) < 100_000
]


@pytest.mark.parametrize("data", FILES)
@pytest.mark.parametrize("loaded", [False, True], ids=["opened", "loaded"])
def test_an_image_that_was_not_changed_is_sent_as_its_file(data: bytes, loaded: bool, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(data)
    try:
        with Image.open(path) as picture:
            if loaded:
                picture.load()
            assert to_image(picture).data == data
    except (OSError, ValueError):  # Pillow by itself reads less than the service does: then there is no image to pass
        with pytest.raises((OSError, ValueError)), Image.open(path) as picture:
            picture.load()


LOSSLESS = {
    "1": ("PNG", "TIFF", "BMP"),
    "L": ("PNG", "TIFF", "BMP", "GIF"),
    "LA": ("PNG", "TIFF"),
    "P": ("PNG", "TIFF", "BMP", "GIF"),
    "PA": ("TIFF",),
    "RGB": ("PNG", "TIFF", "BMP"),
    "RGBA": ("PNG", "TIFF"),
    "RGBX": ("TIFF",),
    "CMYK": ("TIFF",),
    "YCbCr": ("TIFF",),
    "LAB": ("TIFF",),
    "I": ("TIFF",),
    "I;16": ("PNG", "TIFF"),
    "I;16B": ("TIFF",),
    "F": ("TIFF",),
}


def of_mode(mode: str) -> Image.Image:
    """An image whose pixels differ, in a mode that files have."""
    if mode.startswith("I;16"):
        wide = np.array([[0, 256, 40_000], [300, 65_535, 9]], ">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, (3, 2), wide.tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(GREYS.astype(np.int32) * 200 if mode == "I" else GREYS.astype(np.float32) / 255)
    if mode in ("P", "PA"):
        indexed = Image.fromarray(np.array([[0, 1, 2], [3, 0, 1]], np.uint8))
        indexed.putpalette(PALETTE)
        return indexed if mode == "P" else indexed.convert("PA")
    bands = {"1": 1, "L": 1, "LA": 2, "CMYK": 4, "RGBA": 4, "RGBX": 4}.get(mode, 3)
    if mode == "1":
        return Image.fromarray(GREYS > 100)
    values = np.random.default_rng(0).integers(0, 256, (2, 3, bands), dtype=np.uint8)
    return Image.frombytes(mode, (3, 2), values.tobytes())


@pytest.mark.parametrize(("mode", "form"), [(mode, form) for mode, forms in LOSSLESS.items() for form in forms])
def test_an_image_of_any_mode_is_read_as_a_file_of_it(mode: str, form: str) -> None:
    picture = of_mode(mode)
    buffer = io.BytesIO()
    picture.save(buffer, form)
    assert sent(picture) == pixels(buffer.getvalue())


def test_modes_that_no_file_has_keep_their_colours() -> None:
    layer = of_mode("RGBA")
    assert sent(layer.convert("RGBa")) == sent(layer.convert("RGBa").convert("RGBA"))
    grey = of_mode("LA")
    assert sent(grey.convert("La")) == sent(grey.convert("La").convert("LA"))
    assert sent(of_mode("RGB").convert("HSV")) == np.asarray(of_mode("RGB").convert("HSV").convert("RGB")).tolist()
    assert len({str(pixel) for row in sent(layer.convert("RGBa")) for pixel in row}) > 1, "it is not black all over"


def test_wide_greys_are_not_clipped() -> None:
    assert sent(Image.fromarray(np.array([[0, 32_896, 65_535]], np.int32))) == rgb(np.array([[0, 128, 255]]))
    assert sent(Image.fromarray(np.array([[0, 0.5, 1]], np.float32))) == rgb(np.array([[0, 128, 255]]))
    big_endian = Image.frombytes("I;16B", (3, 1), np.array([0, 32_896, 65_535], ">u2").tobytes())
    assert sent(big_endian) == rgb(np.array([[0, 128, 255]]))


def test_a_palette_with_transparency() -> None:
    picture = of_mode("P")
    for transparency in (2, bytes([0, 51, 255])):
        picture.info["transparency"] = transparency
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        assert sent(picture) == pixels(buffer.getvalue())
    looked_up = of_mode("P")
    looked_up.putpalette(bytes([255, 0, 0, 0, 0, 0, 255, 255]), "RGBA")
    assert sent(looked_up)[0][:2] == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize(
    "data",
    [
        png(np.array([[0, 1, 2, 3]], np.uint8), 2, 0, chunk(b"tRNS", b"\0\1")),
        png(np.array([[3, 7, 15]], np.uint8), 4, 0, chunk(b"tRNS", b"\0\3")),
        png(np.array([[10, 11]], np.uint8), 8, 0, chunk(b"tRNS", b"\0\x0a")),
        png(np.array([[0x1234, 0x1235]], np.uint16), 16, 0, chunk(b"tRNS", b"\x12\x34")),
        png(np.array([[[257, 514, 771], [0, 0, 0]]], np.uint16), 16, 2, chunk(b"tRNS", b"\1\1\2\2\3\3")),
    ],
)
def test_a_transparent_colour_stays_transparent_in_a_copy(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as picture:
        assert sent(picture.copy()) == pixels(data)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK"])
def test_a_profile_is_sent_along(mode: str) -> None:
    picture = of_mode(mode)
    if mode == "P":
        picture.putpalette(bytes([90, 120, 80, 120, 90, 100, 60, 70, 90, 150, 160, 170]))
        plain = sent(picture)
    picture.info["icc_profile"] = grey_profile(1.0) if mode == "L" else P3
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF" if mode == "CMYK" else "PNG", icc_profile=picture.info["icc_profile"])
    plain = plain if mode == "P" else sent(of_mode(mode))
    assert sent(picture) == pixels(buffer.getvalue())
    assert (sent(picture) == plain) is (mode == "CMYK"), "CMYK has no use for a profile of RGB"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I", "I;16", "F", "CMYK", "LAB"])
def test_an_image_is_sent_upright(mode: str) -> None:
    picture = of_mode(mode)
    right = np.rot90(np.array(sent(picture)), -1).tolist()
    picture.getexif()[ExifTags.Base.Orientation] = 6
    assert sent(picture) == right


@pytest.mark.parametrize("packet", [False, True], ids=["EXIF", "XMP"])
def test_an_opened_image_is_turned_once(packet: bool, tmp_path: Path) -> None:
    exif = Image.Exif()
    if not packet:
        exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (16, 8)).save(path, exif=exif, **({"xmp": xmp(6)} if packet else {}))
    with Image.open(path) as picture:
        assert np.shape(sent(picture)) == (16, 8, 3)
        picture.putpixel((0, 0), (255, 255, 255))
        assert np.shape(sent(picture)) == (16, 8, 3)
        assert sent(picture)[0][7] == [255, 255, 255]


def test_a_change_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    of_mode("RGB").save(path)

    def paint(picture: Image.Image) -> None:
        ImageDraw.Draw(picture).point((1, 1), (1, 2, 3))

    def profile(picture: Image.Image) -> None:
        picture.info["icc_profile"] = P3

    def orientation(picture: Image.Image) -> None:
        picture.getexif()[ExifTags.Base.Orientation] = 3

    def transparent(picture: Image.Image) -> None:
        picture.info["transparency"] = picture.getpixel((0, 0))

    def smaller(picture: Image.Image) -> None:
        picture.thumbnail((2, 2))

    for change in (paint, profile, orientation, transparent, smaller):
        with Image.open(path) as picture:
            assert to_image(picture).data == path.read_bytes()
            change(picture)
            assert sent(picture) != pixels(path.read_bytes()), change.__name__


def test_a_later_frame_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "picture.gif"
    path.write_bytes(
        gif((2, 1), [((0, 0, 2, 1), [0, 1], None, None), ((0, 0, 2, 1), [2, 3], None, None)], palette=PALETTE)
    )
    with Image.open(path) as picture:
        picture.seek(1)
        assert sent(picture) == [[[255, 0, 0], [0, 255, 0]]]


def test_a_file_that_is_gone_or_replaced_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    of_mode("RGB").save(path)
    right = pixels(path.read_bytes())
    for replacement in (None, b"text", b"\x89PNG\r\n\x1a\n", encoded_png()):
        of_mode("RGB").save(path)
        with Image.open(path) as picture:
            picture.load()
            path.unlink()
            if replacement is not None:
                path.write_bytes(replacement)
            assert sent(picture) == right


def encoded_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_file_of_a_format_that_the_service_does_not_read_is_encoded(tmp_path: Path) -> None:
    path = tmp_path / "picture.ppm"
    of_mode("RGB").save(path)
    with pytest.raises(PictureError):
        pixels(path.read_bytes())
    with Image.open(path) as picture:
        assert sent(picture) == np.asarray(of_mode("RGB")).tolist()


def test_a_file_that_grew_large_for_no_reason_is_encoded(tmp_path: Path) -> None:
    path = tmp_path / "picture.bmp"
    Image.new("RGB", (2500, 2500)).save(path)
    with Image.open(path) as picture:
        assert len(to_image(picture).data) < path.stat().st_size / 10


def test_what_a_mode_does_not_tell_is_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    path.write_bytes(tiff(np.array([[0, 2048, 4095]], np.uint16), 12, 1))
    with Image.open(path) as picture:
        assert picture.mode == "I;16"
        assert sent(picture) == rgb(np.array([[0, 128, 255]]))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SMALL = arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)


@given(arrays.arrays(np.uint8, SMALL.map(lambda shape: (*shape, 4))), st.sampled_from([None, SRGB]))
def test_any_rgba_image_is_composited_on_white(values: np.ndarray, profile: bytes | None) -> None:
    picture = Image.fromarray(values)
    if profile is not None:
        picture.info["icc_profile"] = profile
    alpha = values[..., 3:].astype(float) / 255
    right = values[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.array(sent(picture)) - right).max() <= 1


@given(arrays.arrays(np.uint16, SMALL), st.sampled_from(["I;16", "I;16B"]))
def test_any_16_bit_grey_is_scaled(values: np.ndarray, mode: str) -> None:
    stored = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    picture = Image.frombytes(mode, values.shape[::-1], stored)
    assert sent(picture) == rgb(np.rint(values / 257).astype(int))


@given(arrays.arrays(np.float32, SMALL, elements=st.floats(0, 1, width=32)))
def test_any_floating_point_grey_is_scaled(values: np.ndarray) -> None:
    assert np.abs(np.array(sent(Image.fromarray(values))) - np.array(rgb(values * 255))).max() <= 0.51


@given(arrays.arrays(np.uint8, SMALL.map(lambda shape: (*shape, 4))))
def test_any_cmyk_image_is_taken_for_ideal_inks(values: np.ndarray) -> None:
    picture = Image.frombytes("CMYK", values.shape[1::-1], values.tobytes())
    light = 1 - values.astype(float) / 255
    assert np.abs(np.array(sent(picture)) - 255 * light[..., :3] * light[..., 3:]).max() <= 1
