"""Mistral 3: pixels and attention of Pixtral's tower, rows and what ends them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vflowopt.generation import picture
from tests.vflowopt.models.tiny_mistral3 import MISTRAL3, TinyMistral3
from tests.vflowopt.reference import Reference
from vflowopt.media.picture import Picture, PictureError, PictureLimits
from vflowopt.models.loading import load_model
from vflowopt.models.mistral3 import Mistral3

SIZES = [(112, 196), (300, 90), (61, 61), (10, 14), (513, 511)]


@pytest.fixture(scope="module", params=MISTRAL3, ids=lambda tiny: tiny.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny: TinyMistral3 = request.param
    return tiny.save(tmp_path_factory.mktemp(tiny.name))


@pytest.fixture(scope="module")
def model(folder: Path) -> Mistral3:
    model = load_model(folder)
    assert isinstance(model, Mistral3)
    return model


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_tower_sees_and_attends_like_hugging_faces(model: Mistral3, folder: Path, size: tuple[int, int]) -> None:
    pixels = picture(*size, 1)
    seen: list[Tensor] = []
    with model.network.model.vision_tower.patch_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        (encoded,) = model.encode([Picture.from_pixels(pixels)])
    reference = Reference(folder)
    batch = reference.processor(pixels, return_tensors="pt", patch_size=model.patch * model.merge)
    assert torch.equal(seen[0], batch["pixel_values"])

    tower = reference.network.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = tower(batch["pixel_values"], batch["image_sizes"], output_attentions=True).attentions
    (ours,) = encoded.attention()
    torch.testing.assert_close(ours, attentions[model.scoring_layer][0].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_end_with_a_structural_token_and_boxes_tile_the_picture(model: Mistral3, size: tuple[int, int]) -> None:
    (encoded,) = model.encode([Picture.from_pixels(picture(*size, 2))])
    layout = encoded.layout
    ((rows, columns),) = layout.shapes()
    assert layout.structural.view(rows, columns + 1).tolist() == [[False] * columns + [True]] * rows
    marks = model.tokenizer.convert_tokens_to_ids(["[IMG_BREAK]"] * (rows - 1) + ["[IMG_END]"])
    expected = model.decoder.embed_tokens(torch.tensor(marks))
    assert torch.equal(encoded.embeddings[layout.structural], expected)
    boxes = layout.boxes[~layout.structural]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert float(areas.sum()) == pytest.approx(size[0] * size[1], rel=1e-4)


def test_a_picture_of_which_nothing_would_be_left_is_refused(model: Mistral3) -> None:
    with pytest.raises(PictureError, match="2000 x 4 pixels") as refused:
        model.encode([Picture.from_pixels(np.zeros((4, 2000, 3), np.uint8), PictureLimits(max_aspect=500))])
    assert refused.value.reason == "PICTURE_TOO_NARROW"
