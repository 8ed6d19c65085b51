"""Whatever samples a file holds, they are read by one formula; and whatever is done to a file harms nothing."""

import struct
import warnings

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.vflowopt.picture_files import bmp, chunk, gif, png, tiff
from tests.vflowopt.picture_lines import LINES, PALETTE
from vflowopt.media.picture import Picture, PictureError, PictureLimits

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
Samples = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


@st.composite
def pictures(draw: st.DrawFn, depths: tuple[int, ...], bands: int = 1) -> tuple[Samples, int]:
    """Samples of any size, and their depth."""
    depth = draw(st.sampled_from(depths))
    shape = draw(SIZES) if bands == 1 else (*draw(SIZES), bands)
    kind = "uint16" if depth > 8 else "uint8"
    return draw(arrays.arrays(kind, shape, elements=st.integers(0, 2**depth - 1))), depth


def eight_bits(samples: Samples, depth: int) -> Samples:
    return np.rint(samples.astype(float) * 255 / (2**depth - 1)).astype(int)


def grey(values: Samples) -> list[object]:
    return np.repeat(values[..., None], 3, axis=-1).tolist()


@given(pictures((1, 2, 4, 8, 16)), st.data())
def test_png_greys_and_their_transparent_colour(picture: tuple[Samples, int], data: st.DataObject) -> None:
    samples, depth = picture
    right = eight_bits(samples, depth)
    assert Picture.decode(png(samples, depth, 0)).pixels.tolist() == grey(right)
    colour = data.draw(st.sampled_from(samples.ravel().tolist()) | st.integers(0, 2**depth - 1))
    right[samples == colour] = 255
    with_colour = png(samples, depth, 0, chunk(b"tRNS", struct.pack(">H", colour)))
    assert Picture.decode(with_colour).pixels.tolist() == grey(right)


@given(pictures((8, 16), bands=3), st.data())
def test_png_colours_and_their_transparent_colour(picture: tuple[Samples, int], data: st.DataObject) -> None:
    samples, depth = picture
    colour = data.draw(st.sampled_from(samples.reshape(-1, 3).tolist()))
    right = eight_bits(samples, depth)
    clear = (samples == colour).all(axis=-1)
    right[clear] = 255
    pixels = Picture.decode(png(samples, depth, 2, chunk(b"tRNS", struct.pack(">3H", *colour)))).pixels
    assert np.abs(pixels.astype(int) - right).max() <= (1 if depth == 16 else 0)
    assert (pixels[clear] == 255).all()


@given(pictures((1, 2, 4, 8, 12, 16)), st.sampled_from("<>"), st.booleans(), st.booleans())
def test_tiff_greys(picture: tuple[Samples, int], order: str, white_is_zero: bool, big: bool) -> None:
    samples, depth = picture
    if depth == 12 or big:
        order = "<"
    right = eight_bits(samples, depth)
    data = tiff(samples, depth, 0 if white_is_zero else 1, order=order, big=big)
    assert Picture.decode(data).pixels.tolist() == grey(255 - right if white_is_zero else right)


@given(pictures((8,), bands=4), st.sampled_from([108, 124]), st.booleans())
def test_bmp_colours_and_alpha(picture: tuple[Samples, int], header: int, top_down: bool) -> None:
    samples, _ = picture
    height, width, _ = samples.shape
    stored = samples if top_down else samples[::-1]
    rows = np.ascontiguousarray(stored[..., [2, 1, 0, 3]]).tobytes()
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    data = bmp(rows, width, -height if top_down else height, 32, header=header, compression=3, masks=masks)
    alpha = samples[..., 3:] / 255 if samples[..., 3].any() else np.ones((height, width, 1))
    right = samples[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(Picture.decode(data).pixels - right).max() <= 1


@given(
    SIZES, st.tuples(st.integers(0, 5), st.integers(0, 5)), st.integers(0, 5), st.none() | st.integers(0, 3), st.data()
)
def test_gif_frames_of_any_place(
    size: tuple[int, int], place: tuple[int, int], margin: int, transparent: int | None, data: st.DataObject
) -> None:
    (height, width), (left, top) = size, place
    indices = data.draw(arrays.arrays(np.uint8, size, elements=st.integers(0, 3)))
    canvas = (left + width + margin, top + height + margin)
    frame = ((left, top, width, height), indices.ravel().tolist(), None, transparent)
    right = np.full((canvas[1], canvas[0], 3), 255)
    colours = np.frombuffer(PALETTE, np.uint8).reshape(4, 3).astype(int)
    if transparent is not None:
        colours[transparent] = 255
    right[top : top + height, left : left + width] = colours[indices]
    assert Picture.decode(gif(canvas, [frame], palette=PALETTE)).pixels.tolist() == right.tolist()


FILES = [case.data for cases in LINES.values() for case in cases if len(case.data) < 20_000]
EDITS = st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=8)


@given(st.sampled_from(FILES), EDITS, st.none() | st.integers(1, 400))
def test_a_damaged_file_of_any_kind_is_read_or_refused(
    whole: bytes, edits: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(whole)
    for place, value in edits:
        data[place % len(data) if place % 4 == 0 else place % min(len(data), 200)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            picture = Picture.decode(bytes(data[:cut]), PictureLimits(max_pixels=10_000))
        except PictureError as error:
            assert error.reason.startswith("PICTURE_")
        else:
            assert picture.pixels.dtype == np.uint8
            assert 0 < picture.width * picture.height <= 10_000
