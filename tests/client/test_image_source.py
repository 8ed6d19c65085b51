"""The forms in which a picture may be handed over."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image as PillowImage

from vflow_client import Image
from vflow_client.image_source import to_image


def test_bytes_paths_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"contents")
    for source in (path, str(path), b"contents", bytearray(b"contents"), memoryview(b"contents")):
        assert to_image(source).data == b"contents"
    digest = Image(digest="ab" * 32)
    assert to_image(digest) is digest


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "F"])
def test_a_pillow_image_arrives_as_it_was(mode: str) -> None:
    picture = PillowImage.new("L", (3, 2), 0)
    picture.putdata([0, 50, 100, 150, 200, 250])
    picture = picture.convert(mode) if mode != "I;16" else picture.convert("I").convert("I;16")
    with PillowImage.open(io.BytesIO(to_image(picture).data)) as sent:
        assert sent.format == ("TIFF" if mode in {"CMYK", "F"} else "PNG") and sent.size == (3, 2)
        assert sent.tobytes() == picture.tobytes()
        assert sent.convert("RGB").tobytes() == picture.convert("RGB").tobytes()


def test_a_pillow_image_is_sent_upright() -> None:
    picture = PillowImage.new("RGB", (3, 2))
    picture.getexif()[0x0112] = 6
    with PillowImage.open(io.BytesIO(to_image(picture).data)) as sent:
        assert sent.size == (2, 3)


@pytest.mark.parametrize("source", [None, 3, ["picture.png"]])
def test_anything_else_is_refused(source: object) -> None:
    with pytest.raises(TypeError, match="expected a path, bytes"):
        to_image(source)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        to_image(tmp_path / "nothing.png")


def test_the_client_imports_neither_pillow_nor_torch() -> None:
    check = (
        "import sys, vflow_client, vflow_client.aio, vflow_client.terminal\n"
        "heavy = {'PIL', 'torch', 'numpy', 'transformers', 'vflowopt', 'vflow_server'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_detail_is_said_beside_the_picture_and_leaves_the_source_alone() -> None:
    digest = Image(digest="ab" * 32)
    assert to_image(digest, "low") == Image(digest="ab" * 32, detail=Image.LOW)
    assert digest == Image(digest="ab" * 32)
    assert to_image(b"contents", "high") == Image(data=b"contents", detail=Image.HIGH)
    low = Image(data=b"contents", detail=Image.LOW)
    assert to_image(low, "auto") is low
    with pytest.raises(ValueError, match="'medium'; give 'auto', 'low' or 'high'"):
        to_image(b"contents", "medium")  # type: ignore[arg-type]
