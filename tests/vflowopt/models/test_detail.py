"""A picture in low detail: an overview alone, one tile, or a smaller picture, just as Hugging Face would read that."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from tests.vflowopt.generation import Chat, picture
from tests.vflowopt.models.matrix import TinyModel
from tests.vflowopt.models.tiny_internvl import INTERNVL
from tests.vflowopt.models.tiny_llava import LLAVA, LLAVA_NEXT
from tests.vflowopt.models.tiny_mistral3 import MISTRAL3
from tests.vflowopt.models.tiny_qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from tests.vflowopt.reference import Reference
from tests.vflowopt.tiny_models import SHAPES
from vflowopt.compression.importance import patch_entropy
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.families import FAMILIES
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.loading import load_model
from vflowopt.runtime.model_runner import Runtime

LARGE = (640, 560)
"""Height and width of a picture of which every family sees less in low detail, but LLaVA-1.5, which sees one tile."""
SIDE = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32, "mistral3": 28}
"""Pixels of the squares that become tokens, where pictures have any size."""

SMALL_MODELS: tuple[TinyModel, ...] = (
    SHAPES[0],
    LLAVA[0],
    LLAVA_NEXT[1],
    INTERNVL[0],
    replace(MISTRAL3[0], longest_edge=700),
    *(replace(tiny, most_tokens=1024) for tiny in (QWEN2_VL[0], QWEN2_5_VL[0], QWEN3_VL[0])),
)


@pytest.fixture(scope="module", params=SMALL_MODELS, ids=lambda model: model.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: TinyModel = request.param
    return model.save(tmp_path_factory.mktemp(model.name))


@pytest.fixture(scope="module")
def model(folder: Path) -> MultimodalModel:
    return load_model(folder)


def family(model: MultimodalModel) -> str:
    return str(model.network.config.model_type)


def test_low_detail_answers_like_generate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face gets the tiles, or the picture size, that low detail stands for; all else is its own."""
    reference = Reference(folder)
    kind = reference.network.config.model_type
    if kind in SIDE:
        limit = 256 * SIDE[kind] ** 2
        size = {"longest_edge": 16 * SIDE[kind]} if kind == "mistral3" else {"shortest_edge": 4, "longest_edge": limit}
        reference.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", size=size)
    elif kind == "internvl":
        whole = reference.processor
        reference.processor = lambda pixels, **options: whole(pixels, **options | {"crop_to_patches": False})
    elif kind != "llava":
        tiled = reference.processor
        reference.processor = lambda pixels, **options: _overviews(tiled(pixels, **options))
        code = import_module(f"transformers.models.{kind}.modeling_{kind}")
        monkeypatch.setattr(code, "image_size_to_num_patches", lambda **_: 1)
    if kind == "internvl":  # its context, 384 here, has room for no more
        turns = [[picture(*LARGE, 1), "what?"], ["and?"]]
    else:
        turns = [[picture(*LARGE, 1), picture(90, 200, 2), "what?"], ["and?"]]
    expected = reference.answers(turns, 8)
    runtime = Runtime.load(folder, kv_budget=32 << 20)
    chat = Chat(runtime, Strategy.full(), "low")
    assert [chat.ask(turn, 8) for turn in turns] == expected
    for ours, theirs in zip(chat.logits, reference.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    chat.sequence.release()


def _overviews(batch: Any) -> dict[str, Any]:
    return {**batch, "pixel_values": batch["pixel_values"][:, :1]}


def test_low_detail_is_one_tile_or_few_tokens(model: MultimodalModel) -> None:
    shown = Picture.from_pixels(picture(*LARGE, 1))
    high, low = model.encode([shown, shown.in_detail("low")])
    (alone,) = model.encode([shown.in_detail("low")])
    torch.testing.assert_close(low.embeddings, alone.embeddings, atol=1e-4, rtol=1e-4)
    assert (high.detail, low.detail) == ("high", "low") and high.digest == low.digest
    content = int((~low.layout.structural).sum())
    if family(model) == "llava":
        assert torch.equal(low.embeddings, high.embeddings)
    else:
        assert len(low.layout) < len(high.layout)
    if family(model) in SIDE:
        # No side gets longer than its share, so few tokens stay unused.
        assert 0.8 * 256 < content <= 256
    else:
        assert low.pixels.shape[0] == 1 and content == (low.pixels.shape[1] // low.patch // low.merge) ** 2
    # What is small already is seen whole.
    little = Picture.from_pixels(picture(100, 80, 1))
    if family(model) in SIDE:
        assert torch.equal(*(model.encode([little.in_detail(each)])[0].embeddings for each in ("high", "low")))


def test_importance_and_boxes_belong_to_the_tokens_of_low_detail(model: MultimodalModel) -> None:
    pixels = np.full((*LARGE, 3), 90, np.uint8)
    spot = pixels[330:520, 60:240]
    spot[:] = np.random.default_rng(0).integers(0, 256, spot.shape, dtype=np.uint8)
    (encoded,) = model.encode([Picture.from_pixels(pixels).in_detail("low")])
    layout = encoded.layout
    assert len(layout) == len(encoded.embeddings) == encoded.places.shape[-1]
    entropy = encoded.arrange(patch_entropy(encoded.pixels, encoded.patch).flatten(1))
    assert len(entropy) == len(layout)
    left, top, right, bottom = layout.boxes[entropy.masked_fill(layout.structural, -1.0).argmax()].tolist()
    assert left < 240 and right > 60 and top < 520 and bottom > 330
    assert not layout.structural.any() or (layout.boxes[layout.structural] == 0).all()
    assert layout.grid.max() == 0 and len(layout.shapes()) == 1


def test_every_family_is_here() -> None:
    assert len(SMALL_MODELS) == len(FAMILIES)
