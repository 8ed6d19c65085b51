"""The parts of a file are counted before it is decoded; what programs write is far below the limits."""

from collections.abc import Callable

import pytest
from PIL import Image

from tests.server import hostile_pictures as hostile
from vflowopt.media import file_parts
from vflowopt.media.file_parts import excess_of
from vflowopt.media.frame_size import webp_size
from vflowopt.media.picture import Picture, PictureError, PictureLimits

WRITTEN: dict[str, Callable[[Image.Image], bytes]] = {
    "PNG": lambda image: hostile.encoded(image, "PNG"),
    "JPEG": lambda image: hostile.encoded(image, "JPEG", quality=95, exif=orientation(), icc_profile=bytes(200_000)),
    "progressive JPEG": lambda image: hostile.encoded(image, "JPEG", progressive=True, quality=95),
    "WebP": lambda image: hostile.encoded(image, "WEBP", exif=orientation()),
    "animated WebP": lambda image: hostile.encoded(
        image, "WEBP", save_all=True, append_images=[image.rotate(20 * turn) for turn in range(9)]
    ),
    "GIF": lambda image: hostile.encoded(
        image, "GIF", comment=b"a" * 5000, save_all=True, append_images=[image.rotate(90)]
    ),
    "TIFF": lambda image: hostile.encoded(image, "TIFF", compression="tiff_lzw"),
    "TIFF with a row in each strip": lambda image: hostile.encoded(image, "TIFF", tiffinfo={278: 1}, strip_size=1),
    "BMP": lambda image: hostile.encoded(image, "BMP"),
}


def orientation() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif.tobytes()


@pytest.mark.parametrize("form", WRITTEN)
def test_what_programs_write_is_within_the_limits(form: str) -> None:
    image = Image.effect_noise((900, 700), 80).convert("RGB")
    data = WRITTEN[form](image)
    assert excess_of(data) is None
    assert Picture.decode(data).pixels.size == 900 * 700 * 3


TOO_MANY: dict[str, tuple[Callable[[int], bytes], int, str]] = {
    "scans": (lambda most: hostile.jpeg_of_scans(24, most), file_parts.MOST_SCANS, "scans"),
    # Besides those that are added there are nine, and the end.
    "segments": (lambda most: hostile.jpeg_of_segments(most - 10), file_parts.MOST_SEGMENTS, "segments"),
    "filling": (lambda most: hostile.jpeg_of_filling(most), file_parts.MOST_FILLING, "filling bytes"),
    "chunks": (lambda most: hostile.png_of_chunks(most - 3), file_parts.MOST_CHUNKS, "chunks"),
    "EXIF": (lambda most: hostile.png_of_exif(most), file_parts.MOST_NUMBERS, "numbers in its tags"),
    "blocks": (lambda most: hostile.gif_of_blocks(most - 1), file_parts.MOST_BLOCKS, "blocks"),
    "filling of a GIF": (lambda most: hostile.gif_of_filling(most), file_parts.MOST_FILLING, "filling bytes"),
    "fractions": (lambda most: hostile.tiff_of_fractions(most - 5), file_parts.MOST_NUMBERS, "numbers in its tags"),
    "strips": (lambda most: hostile.tiff_of_strips((most - 6) // 2), file_parts.MOST_NUMBERS, "numbers in its tags"),
    "tags": (lambda most: hostile.tiff_of_tags(most - 5, 1), file_parts.MOST_TAGS, "tags"),
}


@pytest.mark.parametrize("kind", TOO_MANY)
def test_a_file_of_too_many_parts_is_refused_before_it_is_decoded(kind: str) -> None:
    make, most, parts = TOO_MANY[kind]
    assert excess_of(make(most)) is None
    excess = excess_of(make(most + 2))
    assert excess is not None and (excess.parts, excess.most) == (parts, most)
    with pytest.raises(PictureError, match=f"more than {most} {parts}") as refused:
        Picture.decode(make(most + 2))
    assert refused.value.reason == "PICTURE_TOO_COMPLEX"
    assert refused.value.metadata == {"resource": parts, "max": str(most)}


def test_tags_that_share_their_bytes_are_refused() -> None:
    excess = excess_of(hostile.tiff_of_tags(40, 1_000_000))
    assert excess is not None and excess.parts == "bytes in its tags"


@pytest.mark.parametrize("form", WRITTEN)
def test_a_file_that_ends_anywhere_is_left_to_its_decoder(form: str) -> None:
    data = WRITTEN[form](Image.new("RGB", (40, 30)))
    assert [end for end in range(min(len(data), 3000)) if excess_of(data[:end]) is not None] == []


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": orientation()}])
@pytest.mark.parametrize("size", [(1, 1), (123, 77), (16383, 90)])
def test_the_size_of_a_webp_is_known_before_its_decoder_takes_memory(
    size: tuple[int, int], options: dict[str, object]
) -> None:
    data = hostile.encoded(Image.new("RGBA", size, (9, 9, 9, 99)), "WEBP", method=0, **options)
    assert webp_size(data) == size
    assert webp_size(data[:29]) is None
    if size[0] > 1:
        with pytest.raises(PictureError) as refused:
            Picture.decode(data, PictureLimits(max_pixels=size[0] * size[1] - 1))
        assert refused.value.reason == "PICTURE_TOO_MANY_PIXELS"
