"""Colour profiles: a picture is converted to sRGB, and a profile that cannot be followed changes nothing."""

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from tests.vflowopt import picture_files as files
from tests.vflowopt.picture_files import encoded
from vflowopt.media.picture import Picture

XYZ_TO_SRGB = np.array(
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)
"""From XYZ under D50, as profiles have it, to the linear light of sRGB."""

DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
"""Columns: red, green and blue in XYZ."""

COLOURS = np.array([[[120, 100, 90], [60, 130, 70], [200, 180, 190], [128, 128, 128], [255, 255, 255]]], np.uint8)


def srgb(linear: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The values 0 to 255 of linear light."""
    light = linear.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def from_lab(lab: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sRGB values of L*a*b* (D50), [..., 3]."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1.0, 0.8249]
    return srgb(xyz @ XYZ_TO_SRGB.T)


def off(pixels: npt.NDArray[np.uint8], right: npt.NDArray[np.float64]) -> float:
    """How far the pixels lie from the right values."""
    return float(np.abs(pixels.astype(float) - right).max())


def profile_of(colorants: npt.NDArray[np.float64], gamma: float = 2.2) -> bytes:
    return files.rgb_profile(gamma, *colorants.T.tolist())


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("colorants", [DISPLAY_P3, ADOBE_RGB], ids=["Display P3", "Adobe RGB"])
def test_rgb_is_converted_to_srgb(form: str, colorants: npt.NDArray[np.float64]) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(Image.fromarray(COLOURS), form, icc_profile=profile_of(colorants), **options)
    right = srgb((COLOURS / 255) ** 2.2 @ colorants.T @ XYZ_TO_SRGB.T)
    assert off(Picture.decode(data).pixels, right) <= 2
    assert off(COLOURS, right) > 5, "the conversion matters"


def test_a_profile_in_several_segments_of_a_jpeg_file_is_followed() -> None:
    plain = encoded(Image.new("RGB", (16, 16), (60, 130, 70)), "JPEG", quality=98)
    data = files.with_profile(plain, profile_of(DISPLAY_P3), size=100)
    right = srgb((np.array([60, 130, 70]) / 255) ** 2.2 @ DISPLAY_P3.T @ XYZ_TO_SRGB.T)
    assert off(Picture.decode(data).pixels, right) <= 4


def test_a_palette_and_alpha_are_converted_too() -> None:
    right = srgb((COLOURS / 255) ** 2.2 @ DISPLAY_P3.T @ XYZ_TO_SRGB.T)
    palette = Image.fromarray(np.arange(5, dtype=np.uint8)[None])
    palette.putpalette(COLOURS.tobytes())
    assert off(Picture.decode(encoded(palette, icc_profile=profile_of(DISPLAY_P3))).pixels, right) <= 2
    layer = Image.fromarray(COLOURS).convert("RGBA")
    layer.putalpha(51)
    data = encoded(layer, icc_profile=profile_of(DISPLAY_P3))
    assert off(Picture.decode(data).pixels, right * 0.2 + 255 * 0.8) <= 2, "colours are converted before they are mixed"


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_greys_are_converted_to_srgb(dtype: str) -> None:
    greys = np.array([[0, 40, 128, 200, 255]], np.uint8)
    stored = greys if dtype == "uint8" else greys.astype(np.uint16) * 257
    data = encoded(Image.fromarray(stored), icc_profile=files.grey_profile(1.0))
    right = srgb(greys / 255)[..., None].repeat(3, axis=-1)
    assert off(Picture.decode(data).pixels, right) <= 1


INKS = np.array([[[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)


@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
def test_inks_are_converted_as_their_profile_says(form: str) -> None:
    corners = np.full((2, 2, 2, 2, 3), [20.0, 0, 0])
    corners[0, 0, 0, 0] = [100, 0, 0]
    corners[1, 0, 0, 0] = [60, -20, -30]
    corners[0, 1, 0, 0] = [50, 40, 0]
    corners[0, 0, 1, 0] = [90, -5, 50]
    corners[0, 0, 0, 1] = [30, 0, 0]
    right = from_lab(np.array([[[60, -20, -30], [50, 40, 0], [90, -5, 50], [30, 0, 0], [100, 0, 0]]], float))
    profile = files.cmyk_profile(corners)
    for place in range(5):
        data = encoded(cmyk(INKS[0, place]), form, icc_profile=profile, **({"quality": 100} if form == "JPEG" else {}))
        assert off(Picture.decode(data).pixels, right[0, place]) <= 5
    plain = Picture.decode(encoded(cmyk(INKS[0, 0]), form)).pixels
    assert off(plain, np.array([0.0, 255, 255])) <= 3, "without a profile, inks are taken for ideal ones"


def cmyk(inks: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.new("CMYK", (16, 16), tuple(inks.tolist()))


def test_the_profile_of_srgb_changes_nothing() -> None:
    data = encoded(Image.fromarray(COLOURS), icc_profile=srgb_profile())
    np.testing.assert_array_equal(Picture.decode(data).pixels, COLOURS)


def hostile() -> list[bytes]:
    good = profile_of(DISPLAY_P3)
    random = np.random.default_rng(0)
    edited = []
    for _ in range(200):
        changed = bytearray(good)
        for place in random.integers(0, len(good), 6):
            changed[place] = random.integers(0, 256)
        edited.append(bytes(changed))
    return [b"", b"\0", good[:100], good[:140], good[:-20], random.bytes(4000), *edited]


def test_a_broken_profile_changes_nothing_and_harms_nothing() -> None:
    for profile in hostile()[:6]:
        data = encoded(Image.fromarray(COLOURS), "TIFF", icc_profile=profile)
        assert Picture.decode(data).pixels.shape == (1, 5, 3)
    for profile in hostile()[6:]:
        Picture.decode(encoded(Image.fromarray(COLOURS), icc_profile=profile))
    np.testing.assert_array_equal(
        Picture.decode(encoded(Image.fromarray(COLOURS), icc_profile=np.random.default_rng(0).bytes(4000))).pixels,
        COLOURS,
    )


@pytest.mark.parametrize("profile", [files.grey_profile(1.0), files.cmyk_profile(np.zeros((2, 2, 2, 2, 3)))])
def test_a_profile_of_other_colours_changes_nothing(profile: bytes) -> None:
    data = encoded(Image.fromarray(COLOURS), icc_profile=profile)
    np.testing.assert_array_equal(Picture.decode(data).pixels, COLOURS)
    grey = encoded(Image.new("L", (2, 2), 77), icc_profile=profile_of(ADOBE_RGB))
    assert Picture.decode(grey).pixels.max() == 77


def test_a_profile_beyond_the_bound_is_ignored() -> None:
    profile = profile_of(DISPLAY_P3) + bytes(9 << 20)
    for form in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(COLOURS), form, icc_profile=profile)
        np.testing.assert_array_equal(Picture.decode(data).pixels, COLOURS)
