"""Families that look at tiles: pixels, scores and boxes against Hugging Face's own; towers that are refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText
from transformers.image_utils import ChannelDimension
from transformers.models.internvl.processing_internvl import InternVLProcessor

from tests.vflowopt.generation import picture
from tests.vflowopt.models.tiny_internvl import INTERNVL, NAMES, TinyInternVL
from tests.vflowopt.models.tiny_llava import LLAVA, LLAVA_NEXT, TinyLlava
from tests.vflowopt.tiny_models import SHAPES, Shape
from vflowopt.compression.importance import context_relevance, patch_entropy
from vflowopt.media.picture import Picture
from vflowopt.models.error import ModelError
from vflowopt.models.families import FAMILIES
from vflowopt.models.loading import load_model
from vflowopt.models.normalisation import look_up
from vflowopt.models.tiled import TiledModel
from vflowopt.models.tokenizer import load_tokenizer

TILED = (SHAPES[0], SHAPES[-1], *LLAVA, *LLAVA_NEXT, *INTERNVL)
AREAS = [(0.0, 0.0, 0.5, 0.4), (0.2, 0.3, 0.65, 0.7), (0.5, 0.6, 1.0, 1.0)]
"""Top, left, bottom and right of a spot, as shares of the picture."""
SIZES = [(56, 56), (60, 200), (300, 90), (113, 97)]


@pytest.fixture(scope="module", params=TILED, ids=lambda model: model.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: Shape | TinyLlava | TinyInternVL = request.param
    return model.save(tmp_path_factory.mktemp(model.name))


@pytest.fixture(scope="module")
def model(folder: Path) -> TiledModel:
    loaded = load_model(folder)
    assert isinstance(loaded, TiledModel)
    return loaded


def test_the_tower_sees_what_hugging_faces_processor_makes(model: TiledModel, folder: Path) -> None:
    """Bit for bit, in the numbers that the tower reads."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    options = {"crop_to_patches": True} if model.network.config.model_type == "internvl" else {}
    for size in [*SIZES, (2, 300)]:
        pixels = picture(*size, seed=3)
        batch = processor(pixels, return_tensors="pt", input_data_format=ChannelDimension.LAST, **options)
        seen = model.tiles(Picture.from_pixels(pixels))
        assert seen.dtype == np.uint8
        assert torch.equal(model.normalised(seen), batch["pixel_values"].view(-1, *seen.shape[1:]))


def test_pixels_are_normalised_alike_on_every_device(model: TiledModel) -> None:
    """Bit for bit: both ways look up what the processor makes of a value."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    table = model.normalised(levels).view(3, 256)
    seen = model.tiles(Picture.from_pixels(picture(113, 97, seed=3)))
    assert torch.equal(look_up(table, torch.from_numpy(seen)), model.normalised(seen))


def test_attention_is_that_of_hugging_faces_tower(model: TiledModel, folder: Path) -> None:
    """Of the scoring layer, the class token's part cut off; where it alone is asked, its row."""
    network = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    (encoded,) = model.encode([Picture.from_pixels(picture(100, 60, 5))])
    pixels = model.normalised(encoded.pixels.permute(0, 3, 1, 2).numpy())
    with torch.no_grad():
        attention = network.model.vision_tower(pixels, output_attentions=True).attentions[model.scoring_layer].mean(1)
    if model.tower.class_token:
        by_class = getattr(model.network.config, "vflow_scoring", "mean") == "cls"
        attention = attention[:, :1, 1:] if by_class else attention[:, 1:, 1:]
    torch.testing.assert_close(torch.stack(list(encoded.attention())), attention, atol=1e-6, rtol=1e-4)
    expected = attention[:, 0] if attention.shape[1] == 1 else context_relevance(attention, 1.1)
    torch.testing.assert_close(encoded.context_relevance(1.1), expected, atol=1e-6, rtol=1e-4)


def test_boxes_are_where_the_pixels_of_tokens_come_from(model: TiledModel) -> None:
    """What is textured in a flat picture is textured in the tokens whose boxes lie within, in none that lie without."""
    within, without = 0, 0
    for (height, width), area in itertools.product(SIZES, AREAS):
        top, left, bottom, right = (round(share * (height, width)[axis % 2]) for axis, share in enumerate(area))
        pixels = np.full((height, width, 3), 90, np.uint8)
        spot = pixels[top:bottom, left:right]
        spot[:] = np.random.default_rng(0).integers(0, 256, spot.shape, dtype=np.uint8)
        (encoded,) = model.encode([Picture.from_pixels(pixels)])
        entropy = encoded.arrange(patch_entropy(encoded.pixels, encoded.patch).flatten(1))
        start, end = encoded.layout.boxes.split(2, dim=-1)
        near, far, corner = (torch.tensor(point) for point in ((left, top), (right, bottom), (width, height)))
        content = (end > start).all(-1)
        inside = content & ((start >= near) & (end <= far)).all(-1)
        # Tokens at the rim may hold padding, too. Resizing blurs; and where packing shrinks a grid (LLaVA-OneVision's
        # largest mosaics) a token has a share in its neighbours' pixels.
        whole = content & ((start > 0) & (end < corner)).all(-1)
        margin = (end - start) * (0.5 if model.network.config.model_type == "llava_onevision" else 0.25)
        outside = whole & ((end + margin <= near) | (start - margin >= far)).any(-1)
        assert (entropy[inside] > 1).all(), (height, width, area)
        assert (entropy[outside] < 1e-4).all(), (height, width, area)
        within, without = within + int(inside.sum()), without + int(outside.sum())
    assert within and without


@pytest.mark.parametrize("shape", INTERNVL, ids=lambda shape: shape.name)
def test_a_picture_of_internvl_takes_the_tokens_that_its_processor_writes(shape: TinyInternVL, tmp_path: Path) -> None:
    model = load_model(shape.save(tmp_path))
    for size in SIZES:
        (encoded,) = model.encode([Picture.from_pixels(picture(*size, 1))])
        tiles = len(encoded.pixels)
        side = shape.side // (2 * encoded.patch)
        writer: Any = SimpleNamespace(
            start_image_token=NAMES["start_image_token"],
            end_image_token=NAMES["end_image_token"],
            image_token=model.image_token,
            image_seq_length=side * side,
        )
        written = InternVLProcessor.replace_image_token(writer, {"num_patches": [tiles]}, 0)
        ids = model.tokenizer(written)["input_ids"]
        assert len(ids) == len(encoded.embeddings)
        assert encoded.layout.structural.tolist() == [each != model.network.config.image_token_id for each in ids]
        ends = torch.tensor([ids[0], ids[-1]])
        assert torch.equal(encoded.embeddings[[0, -1]], model.decoder.embed_tokens(ends))
        # Each grid covers the whole picture, without gaps or overlaps.
        for index, (rows, columns) in enumerate(encoded.layout.shapes()):
            boxes = encoded.layout.boxes[(encoded.layout.grid == index) & ~encoded.layout.structural]
            assert len(boxes) == rows * columns
            area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).sum()
            assert float(area) == pytest.approx(size[0] * size[1], rel=1e-4)


def test_what_is_cropped_away_is_covered_by_no_token(tmp_path: Path) -> None:
    model = load_model(LLAVA[0].save(tmp_path))
    assert isinstance(model, TiledModel)
    layout = model.layout(100, 300, "high")
    left, top, right, bottom = (layout.boxes[:, side] for side in range(4))
    assert (float(left.min()), float(right.max())) == pytest.approx((100, 200), abs=1)
    assert (float(top.min()), float(bottom.max())) == (0, 100)


CLIP, SIGLIP = LLAVA[0], LLAVA[2]


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        (CLIP, lambda config: config.update(vision_config={"model_type": "pixtral"}), "a vision tower 'pixtral'"),
        (CLIP, lambda config: config.update(vision_feature_select_strategy="full"), "vision_feature_select_strategy"),
        (SIGLIP, lambda config: config.update(vision_feature_select_strategy="default"), "other than 'full'"),
        (CLIP, lambda config: config.update(vflow_scoring="rows"), r"vflow_scoring 'rows' \(supported: mean, cls\)"),
        (SIGLIP, lambda config: config.update(vflow_scoring="cls"), "without class token"),
        (LLAVA_NEXT[1], lambda config: config["text_config"].update(sliding_window=4096), "sliding-window"),
        (INTERNVL[0], lambda config: config.update(vision_feature_layer=[-1, -2]), "several feature layers"),
        (INTERNVL[0], lambda config: config["vision_config"].update(image_size=[56, 28]), "oblong tiles of 56 x 28"),
    ],
    ids=["pixtral", "all-of-clip", "less-of-siglip", "scoring", "no-class", "window", "layers", "oblong"],
)
def test_what_would_be_read_wrongly_is_refused(
    shape: TinyLlava | TinyInternVL, change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    config_file = shape.save(tmp_path) / "config.json"
    document = json.loads(config_file.read_text())
    change(document)
    config_file.write_text(json.dumps(document))
    config = AutoConfig.from_pretrained(tmp_path)
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        network = family.architecture._from_config(config)
    with pytest.raises(ModelError, match=message) as refused:
        family(network, load_tokenizer(tmp_path), None)
    assert refused.value.reason == "MODEL_UNSUPPORTED"
