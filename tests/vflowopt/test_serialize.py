"""Compressed pictures as bytes: every field comes back, equal pictures have equal bytes, and nothing else is taken."""

from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save

from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.pipeline import CompressedImage, CompressionTimings
from vflowopt.compression.serialize import PackingError, pack, unpack


@pytest.fixture
def image() -> CompressedImage:
    positions = torch.arange(4).expand(3, 4)  # three axes that share their memory
    kept = torch.tensor([0, 2, 3, 5])
    return CompressedImage(
        digest="ab" * 32,
        layout=TokenLayout(
            grid=torch.zeros(6, dtype=torch.int64),
            row=torch.arange(6) // 3,
            column=torch.arange(6) % 3,
            structural=torch.arange(6) % 3 == 2,
            boxes=torch.rand(6, 4),
        ),
        importance=torch.rand(6),
        kept=(kept, kept[:2], kept[:0]),
        recycled=kept[1:2],
        embeddings=torch.rand(8, 4).t().to(torch.bfloat16)[:, :8],
        positions=positions,
        span=6,
        timings=CompressionTimings(1.0, 2.0, 3.0),
        detail="low",
    )


def test_every_field_but_the_timings_comes_back(image: CompressedImage) -> None:
    back = unpack(pack(image))
    for field in fields(TokenLayout):
        assert torch.equal(getattr(back.layout, field.name), getattr(image.layout, field.name)), field.name
    assert [kept.tolist() for kept in back.kept] == [kept.tolist() for kept in image.kept]
    assert back.timings == CompressionTimings(0, 0, 0)
    for field in fields(CompressedImage):
        value, expected = getattr(back, field.name), getattr(image, field.name)
        if isinstance(expected, torch.Tensor):
            assert value.dtype == expected.dtype and torch.equal(value, expected), field.name
        elif field.name not in ("layout", "kept", "timings"):
            assert value == expected, field.name


def test_equal_pictures_have_equal_bytes(image: CompressedImage) -> None:
    assert pack(replace(image, timings=CompressionTimings(7, 7, 7))) == pack(image)
    assert pack(unpack(pack(image))) == pack(image)
    assert pack(replace(image, span=7)) != pack(image)


def test_what_was_packed_before_videos_were_is_a_picture(image: CompressedImage) -> None:
    older = pack(image).replace(rb", \"frames\": 0", b"")
    header = len(pack(image)) - len(older)
    assert header > 0
    older = (int.from_bytes(older[:8], "little") - header).to_bytes(8, "little") + older[8:]
    assert unpack(older).frames == 0 and unpack(older).identity == image.identity


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_what_is_cut_off_is_refused(image: CompressedImage, length: int) -> None:
    with pytest.raises(PackingError, match="not a compressed picture"):
        unpack(pack(image)[:length])


def test_what_is_something_else_is_refused(image: CompressedImage) -> None:
    for other in (
        save({"weight": torch.zeros(3)}),
        save({"weight": torch.zeros(3)}, {"kind": "model"}),
        b"\x89PNG" * 9,
    ):
        with pytest.raises(PackingError, match="not a compressed picture"):
            unpack(other)
