"""Whole pictures through compression: budgets met in bytes, layouts that match pixels."""

import pytest
import torch

from tests.vflowopt.generation import picture
from tests.vflowopt.tiny_models import SHAPES, save
from vflowopt.compression.pruning import stage_targets
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.llava_onevision import LlavaOnevision
from vflowopt.runtime.model_runner import Runtime

SIZES = [(56, 56), (112, 112), (60, 200), (300, 90), (113, 97), (30, 40), (1, 200), (300, 2), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
def test_the_presets_keep_their_budget_in_the_cache(runtime: Runtime, size: tuple[int, int], budget: float) -> None:
    strategy = Strategy.preset(budget, 6)
    image, full = (
        runtime.compress([Picture.from_pixels(picture(*size, 1))], each)[0] for each in (strategy, Strategy.full())
    )
    held = {}
    for each, how in ((image, strategy), (full, Strategy.full())):
        sequence = runtime.start(how)
        runtime.extend(sequence, [each], want_logits=False)
        held[how] = sum(
            tensor.numel() * tensor.element_size()
            for stage in sequence.cache.stages
            for layer in stage.layers
            for tensor in stage.read(layer)
        )
        sequence.release()
    structural = int(image.layout.structural.sum())
    floor = (structural + 1) / image.tokens
    assert held[strategy] <= max(budget, floor) * held[Strategy.full()]
    targets = stage_targets(strategy, image.tokens, structural, 6)
    assert [len(kept) for kept in image.kept] == list(targets)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_boxes_tile_the_picture(shape: object, tmp_path: object) -> None:
    runtime = Runtime.load(save(shape, tmp_path), kv_budget=1 << 22)  # type: ignore[arg-type]
    model = runtime.model
    assert isinstance(model, LlavaOnevision)
    for height, width in SIZES:
        layout = model.layout(height, width, "high")
        (encoded,) = model.encode([Picture.from_pixels(picture(height, width, 2))])
        assert len(layout) == len(encoded.embeddings) == len(encoded.layout)
        for index, (rows, columns) in enumerate(layout.shapes()):
            inside = (layout.grid == index) & ~layout.structural
            assert int(inside.sum()) == rows * columns
            boxes = layout.boxes[inside]
            assert (boxes[:, 2:] >= boxes[:, :2]).all()
            # Packing cuts whole rows of patches, so a mosaic may miss up to a patch at each rim.
            area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            assert float(area.sum()) == pytest.approx(height * width, rel=0.35 if index else 1e-4)
            assert float(area.sum()) <= height * width * 1.0001


def test_a_batch_of_pictures_is_compressed_like_each_alone(runtime: Runtime) -> None:
    strategy = Strategy.from_budget(0.2, 6, (0.3, 0.8), threshold=1.0, alpha=0.2, grid=2.5)
    shown = [Picture.from_pixels(picture(*size, seed)) for seed, size in enumerate(SIZES)]
    for alone, together in zip(
        (runtime.compress([each], strategy)[0] for each in shown), runtime.compress(shown, strategy), strict=True
    ):
        torch.testing.assert_close(alone.importance, together.importance, atol=1e-5, rtol=1e-5)
        assert [kept.tolist() for kept in alone.kept] == [kept.tolist() for kept in together.kept]
        torch.testing.assert_close(alone.embeddings, together.embeddings, atol=1e-4, rtol=1e-4)


def test_scores_are_those_of_the_whole_attention(runtime: Runtime) -> None:
    """The importance equals that of the full attention of the scoring layer, computed the plain way."""
    model = runtime.model
    assert isinstance(model, LlavaOnevision)
    shown = Picture.from_pixels(picture(112, 112, 3))
    (image,) = runtime.compress([shown], Strategy((0,), (0.5,)))
    (encoded,) = model.encode([shown])
    attention = (encoded.query @ encoded.key.transpose(-1, -2) * encoded.scale).softmax(-1).mean(1)
    overview = attention[0].mean(0)
    torch.testing.assert_close(image.importance[: len(overview)], overview, atol=1e-6, rtol=1e-5)
