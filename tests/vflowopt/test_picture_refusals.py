"""What is refused, for which reason, and with which metadata: as the contract promises."""

import io
import re
import struct
import sys

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.repository.source import ROOT
from tests.server.hostile_pictures import jpeg_of_scans
from tests.vflowopt import picture_files as files
from tests.vflowopt.picture_files import chunk, encoded
from tests.vflowopt.picture_lines import JPEG_RED, with_frame_header
from vflowopt.media import frame
from vflowopt.media.file_parts import MOST_SCANS
from vflowopt.media.picture import Picture, PictureError, PictureLimits

LARGE = 20_000


def refused(data: bytes, limits: PictureLimits | None = None) -> PictureError:
    with pytest.raises(PictureError) as caught:
        Picture.decode(data, limits)
    return caught.value


def promised() -> dict[str, set[str]]:
    """The metadata of each reason to refuse a picture, as the comments of the contract name it."""
    contract = (ROOT / "proto" / "vflow" / "v1" / "errors.proto").read_text()
    found = {}
    for comment, reason in re.findall(r"((?:  //[^\n]*\n)+)  (PICTURE_\w+) = \d+;", contract):
        text = re.sub(r"\([^)]*\)", "", " ".join(line.strip("/ ") for line in comment.splitlines()))
        names = re.search(r"Metadata: ([^.]*)\.", text)
        found[reason] = {name.strip() for name in names[1].split(",")} if names else set()
    return found


def large(form: str) -> bytes:
    """A file that claims 20,000 x 20,000 pixels."""
    small = encoded(Image.new("RGB", (4, 4)), form, **({"compression": "tiff_lzw"} if form == "TIFF" else {}))
    match form:
        case "PNG":
            header = struct.pack(">II", LARGE, LARGE) + small[24:29]
            return small[:8] + chunk(b"IHDR", header) + small[33:]
        case "GIF":
            at = small.index(b",\0\0\0\0\4\0\4\0")
            return small[: at + 5] + struct.pack("<HH", LARGE, LARGE) + small[at + 9 :]
        case "BMP":
            return small[:18] + struct.pack("<ii", LARGE, LARGE) + small[26:]
        case "JPEG":
            at = small.index(b"\xff\xc0")
            return small[: at + 5] + struct.pack(">HH", LARGE, LARGE) + small[at + 9 :]
        case "TIFF":
            changed = bytearray(small)
            for tag in (256, 257):
                at = small.index(struct.pack("<HHI", tag, 4 if struct.pack("<HHI", tag, 4, 1) in small else 3, 1))
                changed[at + 2 : at + 12] = struct.pack("<HII", 4, 1, LARGE)
            return bytes(changed)
    size = (16_383 - 1).to_bytes(3, "little") * 2  # as large as WebP can be
    still = encoded(Image.new("RGB", (4, 4)), "WEBP", lossless=True)[12:]
    extended = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + size + still
    return b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_picture_of_any_format_is_refused_with_its_size_before_it_is_decoded(form: str) -> None:
    error = refused(large(form))
    side = "16383" if form == "WEBP" else str(LARGE)
    assert (error.reason, error.metadata["width"], error.metadata["height"]) == ("PICTURE_TOO_MANY_PIXELS", side, side)
    assert set(error.metadata) == promised()["PICTURE_TOO_MANY_PIXELS"]


WAV = (
    b"RIFF"
    + struct.pack("<I", 36)
    + b"WAVEfmt "
    + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
    + b"data\0\0\0\0"
)
OTHER_FILES = {
    "WAV": WAV,
    "AVI": b"RIFF\0\0\0\0AVI LIST" + bytes(40),
    "RIFF": b"RIFF",
    "text": b"BMW makes cars, and this text begins with the letters of a bitmap",
    "short text": b"BM",
    "more text": b"GIF8 is no version of anything",
    "film": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2mp41" + bytes(40),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 " + bytes(40),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PDF": b"%PDF-1.7\n",
    "ICO": b"\0\0\1\0\1\0" + bytes(40),
    "PPM": b"P6 1 1 255 abc",
    "DICOM": bytes(128) + b"DICM",
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_files_of_other_kinds_are_no_pictures(name: str) -> None:
    error = refused(OTHER_FILES[name])
    assert error.reason == "PICTURE_NOT_AN_IMAGE"
    assert set(error.metadata) == promised()["PICTURE_NOT_AN_IMAGE"]


RED = encoded(Image.new("RGB", (16, 16), (255, 0, 0)))
EXAMPLES = {
    "PICTURE_EMPTY": (b"", None),
    "PICTURE_NOT_AN_IMAGE": (WAV, None),
    "PICTURE_TRUNCATED": (RED[:-30], None),
    "PICTURE_TOO_LARGE": (RED, PictureLimits(max_bytes=8)),
    "PICTURE_TOO_COMPLEX": (jpeg_of_scans(24, MOST_SCANS + 1), None),
    "PICTURE_TOO_MANY_PIXELS": (RED, PictureLimits(max_pixels=255)),
    "PICTURE_TOO_NARROW": (encoded(Image.new("RGB", (300, 1))), None),
    "PICTURE_UNSUPPORTED": (with_frame_header(JPEG_RED, 0xC1, 12), None),
}


@pytest.mark.parametrize("reason", [*EXAMPLES, "PICTURE_TOO_SMALL"])
def test_every_reason_comes_with_the_metadata_that_the_contract_promises(reason: str) -> None:
    if reason == "PICTURE_TOO_SMALL":
        with pytest.raises(PictureError) as caught:
            Picture.from_pixels(np.zeros((0, 3, 3), np.uint8))
        error = caught.value
    else:
        error = refused(*EXAMPLES[reason])
    assert error.reason == reason
    assert set(error.metadata) == promised()[reason]
    assert "send" in str(error) or "scale" in str(error) or "crop" in str(error), "it says what to do"


def test_these_are_all_reasons_to_refuse_a_picture() -> None:
    by_digest = {"PICTURE_NOT_HELD"}
    assert {*EXAMPLES, "PICTURE_TOO_SMALL"} | by_digest == set(promised())


def heic(**options: object) -> bytes:
    import pillow_heif

    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 30))).save(buffer, quality=90, **options)
    return buffer.getvalue()


def test_heic_is_read_where_its_plugin_is_installed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for data, shape in ((heic(), (48, 64, 3)), (heic(exif=exif.tobytes()), (64, 48, 3))):
        pixels = Picture.decode(data).pixels
        assert pixels.shape == shape
        assert np.abs(pixels.astype(int) - (200, 30, 30)).max() <= 4
    assert refused(heic()[:400]).metadata == {"format": "HEIC"}
    assert "HEIF" not in Image.OPEN, "the plugin reads for this library alone"


def test_heic_is_refused_where_its_plugin_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    error = refused(data)
    assert (error.reason, error.metadata) == ("PICTURE_UNSUPPORTED", {"format": "HEIC", "mode": "HEVC"})
    assert "vflowopt[heic]" in str(error)


@pytest.mark.parametrize("form", ["AVIF", "WEBP"])
def test_a_format_is_refused_where_pillow_was_built_without_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (16, 16)), form)
    monkeypatch.setattr(frame.features, "check", lambda name: name != form.lower())
    assert refused(data).reason == "PICTURE_UNSUPPORTED"


def test_a_profile_is_ignored_where_pillow_was_built_without_lcms(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (1, 1), 40), icc_profile=files.grey_profile(1.0))
    assert Picture.decode(data).pixels.max() > 100
    monkeypatch.setattr(frame.features, "check", lambda name: False)
    assert Picture.decode(data).pixels.max() == 40


def test_want_of_memory_is_not_blamed_on_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(PngImagePlugin.PngImageFile, "load", fail)
        with pytest.raises(MemoryError):
            Picture.decode(RED)
    with monkeypatch.context() as patch:
        patch.setattr(PngImagePlugin.PngImageFile, "_open", fail)
        with pytest.raises(MemoryError):
            Picture.decode(RED)
    with monkeypatch.context() as patch:
        patch.setattr(frame.jpeg, "without_end", fail)
        with pytest.raises(MemoryError):
            Picture.decode(JPEG_RED[:-2])

    def fail_in_pillow(*_: object) -> None:
        raise OSError("out of memory error when reading image file")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail_in_pillow)
    with pytest.raises(MemoryError):
        Picture.decode(RED)
