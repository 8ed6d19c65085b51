"""The Qwen-VL families: squares and windows put back into rows, three axes of positions, features that enter later."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from tests.vflowopt.generation import picture
from tests.vflowopt.models.tiny_qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, TinyQwenVl
from tests.vflowopt.reference import Reference
from vflowopt.compression.importance import context_relevance, patch_entropy
from vflowopt.compression.pipeline import choose, score
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture, PictureError, PictureLimits
from vflowopt.models.error import ModelError
from vflowopt.models.loading import load_model
from vflowopt.models.qwen_vl import QwenVl
from vflowopt.runtime.decoder import FusedDecoder, ModuleDecoder
from vflowopt.runtime.model_runner import Runtime

TINY = (*QWEN2_VL, *QWEN2_5_VL, *QWEN3_VL)
SIZES = [(112, 196), (300, 90), (61, 61), (10, 14), (400, 3), (513, 511)]


@pytest.fixture(scope="module", params=TINY, ids=lambda tiny: tiny.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny: TinyQwenVl = request.param
    return tiny.save(tmp_path_factory.mktemp(tiny.name))


@pytest.fixture(scope="module")
def model(folder: Path) -> QwenVl:
    model = load_model(folder)
    assert isinstance(model, QwenVl)
    return model


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [Picture.from_pixels(picture(*size, seed)) for seed, size in enumerate(SIZES)]


def test_the_tower_sees_the_pixels_that_hugging_faces_processor_makes(
    model: QwenVl, reference: Reference, pictures: list[Picture]
) -> None:
    seen: list[Tensor] = []
    with model.network.model.visual.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        encoded = model.encode(pictures)
    expected = reference.processor([each.pixels for each in pictures], return_tensors="pt")
    assert torch.equal(seen[0], expected["pixel_values"])
    for each, grid in zip(encoded, expected["image_grid_thw"].tolist(), strict=True):
        rows, columns = (side * model.patch for side in grid[1:])
        assert each.pixels.shape == (1, rows, columns, 3)
        assert len(each.layout) == np.prod(grid) // 4


def test_features_and_positions_are_hugging_faces(model: QwenVl, reference: Reference, pictures: list[Picture]) -> None:
    batch = reference.processor([each.pixels for each in pictures], return_tensors="pt")
    grids = batch["image_grid_thw"]
    with torch.no_grad():
        output = reference.network.get_image_features(**batch)
    later = getattr(output, "deepstack_features", None) or []
    for index, each in enumerate(model.encode(pictures)):
        features = torch.cat((output.pooler_output[index], *(layer[index] for layer in later)), dim=-1)
        torch.testing.assert_close(each.embeddings, features, atol=1e-5, rtol=1e-5)
        expected = reference.network.model.get_vision_position_ids(0, grids[index], 1, model.merge)
        assert each.positions is not None
        assert torch.equal(each.positions, expected)


def test_attention_is_that_of_the_scoring_layer_row_by_row(
    model: QwenVl, reference: Reference, pictures: list[Picture]
) -> None:
    visual = reference.network.model.visual
    for shown in pictures[:2]:
        (encoded,) = model.encode([shown])
        batch = reference.processor([shown.pixels], return_tensors="pt")
        weights: list[Tensor] = []
        attention = visual.blocks[model.scoring_layer].attn
        with _eager_weights(attention, weights), torch.no_grad():
            visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        # Where each patch of the tower stands, by Hugging Face's own count of rows and columns.
        places = get_vision_position_ids(batch["image_grid_thw"], model.merge)
        if hasattr(visual, "window_size"):
            windows, _ = get_vision_window_index(
                batch["image_grid_thw"],
                spatial_merge_size=model.merge,
                window_size=visual.window_size,
                patch_size=model.patch,
            )
            places = places.view(-1, model.merge**2, 2)[windows].view(-1, 2)
        order = (places[:, 0] * int(batch["image_grid_thw"][0, 2]) + places[:, 1]).argsort()
        (ours,) = encoded.attention()
        torch.testing.assert_close(ours, weights[0][order][:, order], atol=1e-5, rtol=1e-4)


def _eager_weights(attention: Any, into: list[Tensor]) -> Any:
    """A handle: within, ``into`` gets the weights of an attention of the tower, averaged over heads."""

    def attend(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0]
        query, key, _ = module.qkv(hidden).view(len(hidden), 3, module.num_heads, -1).permute(1, 2, 0, 3)
        cosines, sines = kwargs["position_embeddings"]
        query, key = (each * cosines + _half_turned(each) * sines for each in (query, key))
        into.append((query @ key.transpose(1, 2) * module.scaling).softmax(-1).mean(0))

    return attention.register_forward_pre_hook(attend, with_kwargs=True)


def _half_turned(states: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def test_entropy_is_averaged_over_the_squares_that_become_tokens(model: QwenVl, pictures: list[Picture]) -> None:
    (encoded,) = model.encode(pictures[:1])
    (attention,) = encoded.attention()
    rows, columns = (side // model.patch for side in encoded.pixels.shape[1:3])

    def merged(values: Tensor) -> Tensor:
        return values.view(rows // 2, 2, columns // 2, 2).mean((1, 3)).flatten()

    # An importance map sums to 1 and alpha; the mean over squares of four leaves a quarter of that.
    entropy = merged(patch_entropy(encoded.pixels, model.patch)[0].flatten()).softmax(0) / model.merge**2
    expected = merged(context_relevance(attention, 1.0)) + 0.5 * entropy
    torch.testing.assert_close(score(encoded, Strategy((0,), (0.5,), threshold=1.0, alpha=0.5)), expected)


def test_features_that_enter_later_are_recycled_with_their_token(model: QwenVl, pictures: list[Picture]) -> None:
    (encoded,) = model.encode(pictures[:1])
    strategy = Strategy((0,), (0.4,), threshold=1.0, grid=2.0)
    scores = score(encoded, strategy)
    image = choose(encoded, scores, strategy, 6)
    assert len(image.recycled)
    width = model.decoder.embed_tokens.embedding_dim
    assert image.embeddings.shape[1] == encoded.embeddings.shape[1] == width * (1 + _features_that_enter_later(model))
    for part in range(0, encoded.embeddings.shape[1], width):
        alone = choose(replace(encoded, embeddings=encoded.embeddings[:, part : part + width]), scores, strategy, 6)
        torch.testing.assert_close(image.embeddings[:, part : part + width], alone.embeddings)


def test_likeness_is_of_what_enters_the_first_layer(model: QwenVl, pictures: list[Picture]) -> None:
    (encoded,) = model.encode(pictures[:1])
    strategy = Strategy((0,), (0.3,), diversity=0.9)
    scores = score(encoded, strategy)
    width = model.decoder.embed_tokens.embedding_dim
    assert encoded.later == _features_that_enter_later(model)
    first = replace(encoded, embeddings=encoded.embeddings[:, :width], later=0)
    assert torch.equal(choose(encoded, scores, strategy, 6).kept[0], choose(first, scores, strategy, 6).kept[0])


def _features_that_enter_later(model: QwenVl) -> int:
    return len(getattr(model.network.config.vision_config, "deepstack_visual_indexes", ()))


def test_boxes_tile_the_picture(model: QwenVl, pictures: list[Picture]) -> None:
    for shown, encoded in zip(pictures, model.encode(pictures), strict=True):
        layout = encoded.layout
        height, width = shown.pixels.shape[:2]
        ((rows, columns),) = layout.shapes()
        assert rows * columns == len(layout)
        assert not layout.structural.any()
        areas = (layout.boxes[:, 2] - layout.boxes[:, 0]) * (layout.boxes[:, 3] - layout.boxes[:, 1])
        assert float(areas.sum()) == pytest.approx(height * width, rel=1e-4)
        last = layout.boxes[-1]
        assert last[2:].tolist() == pytest.approx([width, height])


def test_a_picture_too_narrow_for_the_processor_is_refused(model: QwenVl) -> None:
    pixels = np.zeros((2, 500, 3), np.uint8)
    with pytest.raises(PictureError, match="500 x 2 pixels") as refused:
        model.encode([Picture.from_pixels(pixels, PictureLimits(max_aspect=1000))])
    assert refused.value.reason == "PICTURE_TOO_NARROW"


def test_hooks_do_not_stay(model: QwenVl, pictures: list[Picture]) -> None:
    model.encode(pictures[:1])
    attention = model.network.model.visual.blocks[model.scoring_layer].attn
    assert not attention._forward_pre_hooks
    assert not attention.qkv._forward_hooks


def test_layers_are_fused_where_they_can_be(folder: Path) -> None:
    """That they compute the same is a matter of exactness; that they are fused is one of speed."""
    runtime = Runtime.load(folder, kv_budget=1 << 20)
    normed = "qwen3" in runtime.model.network.config.model_type  # norms of queries and keys, which the fused pass lacks
    assert isinstance(runtime.decoder, ModuleDecoder if normed else FusedDecoder)


def changed(folder: Path, into: Path, file: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model's folder with a JSON file of it changed."""
    shutil.copytree(folder, into)
    document = json.loads((into / file).read_text())
    change(document)
    (into / file).write_text(json.dumps(document))
    return into


def test_the_configuration_may_name_the_scoring_layer(tmp_path: Path) -> None:
    folder = QWEN2_VL[0].save(tmp_path / "model")
    other = changed(folder, tmp_path / "other", "config.json", lambda config: config.update(vflow_scoring_layer=-3))
    assert (load_model(folder).scoring_layer, load_model(other).scoring_layer) == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(vflow_scoring_layer=0), "vflow_scoring_layer 0.*window"),
        (lambda config: config["vision_config"].update(fullatt_block_indexes=[]), "without a layer that sees"),
    ],
    ids=["window", "only-windows"],
)
def test_a_layer_that_sees_windows_cannot_score(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = QWEN2_5_VL[0].save(tmp_path / "model")
    with pytest.raises(ModelError, match=message) as refused:
        load_model(changed(folder, tmp_path / "changed", "config.json", change))
    assert refused.value.reason == "MODEL_UNSUPPORTED"


def test_a_processor_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = QWEN3_VL[0].save(tmp_path / "model")
    other = changed(
        folder, tmp_path / "other", "preprocessor_config.json", lambda processor: processor.update(patch_size=14)
    )
    with pytest.raises(ModelError, match="patches of 14 pixels"):
        load_model(other)
