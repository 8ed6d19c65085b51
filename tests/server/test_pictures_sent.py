"""Pictures over the wire: a PIL image is read as its file is, and a refusal comes with what the contract promises."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.vflowopt.picture_files import chunk, png, tiff, xmp
from tests.vflowopt.picture_lines import JPEG_RED, with_frame_header
from tests.vflowopt.test_picture_refusals import promised
from vflow_client import Client
from vflow_client.errors import PictureRejected

WIDE = np.random.default_rng(0).integers(0, 65_536, (40, 60), dtype=np.uint16)


def saved(image: Pillow.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "grey of 16 bits": lambda: saved(Pillow.fromarray(WIDE), "PNG"),
    "grey of 12 bits": lambda: tiff(WIDE >> 4, 12, 1),
    "grey of 16 bits, big-endian": lambda: tiff(WIDE, 16, 1, order=">"),
    "grey of 32 bits": lambda: saved(Pillow.fromarray(WIDE.astype(np.int32)), "TIFF"),
    "floating point": lambda: saved(Pillow.fromarray(WIDE.astype(np.float32) / 65_535), "TIFF"),
    "floating point, white is zero": lambda: tiff(WIDE.astype(np.float32) / 65_535, 32, 0, tags={339: [3]}),
    "CMYK": lambda: saved(Pillow.frombytes("CMYK", (30, 40), WIDE.tobytes()[:4800]), "JPEG"),
    "transparent grey": lambda: png((WIDE >> 12).astype(np.uint8), 4, 0, chunk(b"tRNS", b"\0\3")),
    "orientation in XMP": lambda: saved(Pillow.fromarray((WIDE >> 8).astype(np.uint8)), "JPEG", xmp=xmp(6)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_pil_image_gives_the_tokens_of_its_file(name: str, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(FILES[name]())
    by_path = client.compress(path, embeddings=True)
    with Pillow.open(path) as picture:
        as_image = client.compress(picture, embeddings=True)
    assert as_image.receipt.digest == by_path.receipt.digest
    if name not in ("grey of 12 bits", "floating point, white is zero"):  # the file alone tells which value is white
        with Pillow.open(path) as picture:
            copied = client.compress(picture.copy(), embeddings=True)
        assert copied.embeddings == by_path.embeddings
        assert (copied.receipt.width, copied.receipt.height) == (by_path.receipt.width, by_path.receipt.height)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (with_frame_header(JPEG_RED, 0xC1, 12), "PICTURE_UNSUPPORTED"),
        (JPEG_RED[:-40], "PICTURE_TRUNCATED"),
        (b"text", "PICTURE_NOT_AN_IMAGE"),
    ],
)
def test_a_refusal_comes_with_its_metadata(data: bytes, reason: str, client: Client) -> None:
    with pytest.raises(PictureRejected) as refused:
        client.compress(data)
    assert refused.value.reason == reason
    assert refused.value.metadata["field"] == "image"
    assert set(refused.value.metadata) == {"field"} | promised()[reason]
