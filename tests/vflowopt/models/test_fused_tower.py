"""Towers in fewer operations, and in other number types, against Hugging Face's own."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.vflowopt.generation import picture
from tests.vflowopt.models.tiny_internvl import INTERNVL
from tests.vflowopt.models.tiny_llava import LLAVA, LLAVA_NEXT
from tests.vflowopt.models.tiny_mistral3 import MISTRAL3
from tests.vflowopt.tiny_models import SHAPES
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.demo import model_path
from vflowopt.media.picture import Picture
from vflowopt.models.error import ModelError
from vflowopt.models.loading import load_model
from vflowopt.models.tiled import TiledModel

FUSED = (*SHAPES, *LLAVA, *LLAVA_NEXT)
PICTURES = [Picture.from_pixels(picture(height, width, height)) for height, width in ((448, 448), (60, 200), (113, 97))]


def load(folder: Path) -> TiledModel:
    loaded = load_model(folder)
    assert isinstance(loaded, TiledModel)
    return loaded


def parts(encoded: EncodedImage) -> Sequence[Tensor]:
    optional = [] if encoded.class_key is None else [encoded.class_key]
    return [encoded.embeddings, encoded.query, encoded.key, *optional]


def distance(some: Tensor, others: Tensor) -> float:
    return float((some.double() - others.double()).norm() / others.double().norm())


@pytest.mark.parametrize("shape", FUSED, ids=lambda shape: shape.name)
def test_it_computes_what_hugging_faces_layers_compute(shape: object, tmp_path: Path) -> None:
    model = load(shape.save(tmp_path))  # type: ignore[attr-defined]
    exact = model.encode(PICTURES)
    weights = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    model.fuse()
    assert model.tower.patches is not None
    for found, expected in zip(model.encode(PICTURES), exact, strict=True):
        for some, others in zip(parts(found), parts(expected), strict=True):
            assert some.shape == others.shape and distance(some, others) < 1e-5
    left = model.network.state_dict()
    assert set(left) == set(weights) and all(torch.equal(left[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_in_a_batch_is_encoded_as_alone(dtype: torch.dtype) -> None:
    model = load(model_path())
    model.set_tower_dtype(dtype)
    model.fuse()
    for alone, together in zip(PICTURES, model.encode(PICTURES), strict=True):
        for some, others in zip(parts(model.encode([alone])[0]), parts(together), strict=True):
            assert torch.equal(some, others)


def test_in_bfloat16_it_is_as_exact_as_hugging_faces_tower() -> None:
    exact = load(model_path()).encode(PICTURES)
    theirs, ours = load(model_path()), load(model_path())
    theirs.set_tower_dtype(torch.bfloat16)
    ours.fuse()
    ours.set_tower_dtype(torch.bfloat16)  # converted after it was fused, as a service does it
    assert ours.tower_dtype == torch.bfloat16 and ours.dtype == torch.float32
    for found, reference, expected in zip(ours.encode(PICTURES), theirs.encode(PICTURES), exact, strict=True):
        assert found.embeddings.dtype == torch.float32 and found.query.dtype == torch.bfloat16
        for some, likewise, others in zip(parts(found), parts(reference), parts(expected), strict=True):
            assert 1e-4 < distance(some, others) < 1.2 * distance(likewise, others)


def test_a_tower_that_cannot_be_fused_is_converted(tmp_path: Path) -> None:
    model = load(INTERNVL[0].save(tmp_path))
    exact = model.encode(PICTURES)
    model.fuse()
    assert model.tower.patches is None
    model.set_tower_dtype(torch.bfloat16)
    for found, expected in zip(model.encode(PICTURES), exact, strict=True):
        assert found.embeddings.dtype == torch.float32
        assert 1e-4 < distance(found.embeddings, expected.embeddings) < 0.05


def test_a_family_whose_tower_has_the_decoders_type_says_so(tmp_path: Path) -> None:
    model = load_model(MISTRAL3[0].save(tmp_path))
    model.set_tower_dtype(torch.float32)
    with pytest.raises(ModelError, match="a vision tower of another type"):
        model.set_tower_dtype(torch.bfloat16)
