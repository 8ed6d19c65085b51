"""The fused pass computes what Hugging Face's layers compute."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from tests.vflowopt.generation import picture
from tests.vflowopt.tiny_models import SHAPES, Shape, save
from vflowopt.compression.strategy import Strategy
from vflowopt.demo import model_path
from vflowopt.media.picture import Picture
from vflowopt.runtime.decoder import FusedDecoder, ModuleDecoder
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture(scope="module", params=(*SHAPES, None), ids=lambda shape: shape.name if shape else "embedded")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: Shape | None = request.param
    return save(shape, tmp_path_factory.mktemp(shape.name)) if shape else model_path()


def logits(runtime: Runtime, strategy: Strategy) -> torch.Tensor:
    """Logits along two sequences that are run together: prompts, single tokens, and both in one batch."""
    (image,) = runtime.compress([Picture.from_pixels(picture(100, 60, 1))], strategy)
    first, second = runtime.start(strategy), runtime.start(strategy)
    rows = [runtime.extend(first, [1, 2, image, 3, 4]), runtime.extend(second, list(range(5, 40)))]
    rows += runtime.decode([first, second], [7, 8])
    first.log += [9]
    second.log += [3, image, 4]
    rows += runtime.advance([first, second])
    first.release()
    second.release()
    return torch.stack([row for row in rows if row is not None])


@pytest.mark.parametrize("strategy", [Strategy.full(), Strategy((0, 1, 3), (0.6, 0.5, 0.5), grid=3.0)])
def test_fused_and_modules_agree(folder: Path, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = Runtime.load(folder, kv_budget=32 << 20)
    assert isinstance(fused.decoder, FusedDecoder)
    monkeypatch.setattr(FusedDecoder, "fits", lambda decoder: False)
    plain = Runtime.load(folder, kv_budget=32 << 20)
    assert isinstance(plain.decoder, ModuleDecoder)
    torch.testing.assert_close(logits(fused, strategy), logits(plain, strategy), atol=2e-5, rtol=1e-4)


def test_no_weight_is_held_twice(folder: Path) -> None:
    runtime = Runtime.load(folder, kv_budget=1 << 20)
    assert all(weight.is_meta for weight in runtime.model.decoder.layers.parameters())
    assert not any(weight.is_meta for weight in runtime.model.decoder.embed_tokens.parameters())


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, True),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, True),
        ({"rope_parameters": LONGROPE}, False),
        ({"hidden_act": "gelu"}, False),
    ],
)
def test_only_what_can_be_fused_is_fused(change: dict[str, object], fits: bool) -> None:
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **change,
    )
    assert FusedDecoder.fits(Qwen2Model(config)) is fits


def test_layers_with_maps_of_their_own_kind_are_not_fused() -> None:
    """Quantised maps, say: their weights are not what a product reads."""

    class Quantised(torch.nn.Linear):
        pass

    decoder = Qwen2Model(Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4))
    decoder.layers[0].mlp.up_proj = Quantised(32, 48, bias=False)
    assert not FusedDecoder.fits(decoder)
