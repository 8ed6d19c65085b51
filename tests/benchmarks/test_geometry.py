"""Shapes of published models, the arithmetic of their bounds, and the benchmarks that run on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen3VLForConditionalGeneration

from benchmarks import geometry, scoring
from benchmarks.device import DevicePeak, best_seconds, median_ms
from benchmarks.random_model import GEOMETRIES, SHAPES, random_model
from benchmarks.workload import decoder_weights, encoding_flops, prefill_flops, tower_flops
from vflowopt.compression.strategy import Strategy
from vflowopt.demo import model_path


def on_meta(config: LlavaOnevisionConfig) -> Any:
    """A model of this shape without memory behind it; eager attention, whose products can be counted."""
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return LlavaOnevisionForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("name", "decoder"), [("onevision-0.5b", 494_090_112), ("onevision-7b", 7_616_075_264)])
def test_published_sizes(name: str, decoder: int) -> None:
    """Qwen2's published 494,032,768 and 7,615,616,512 parameters, with 64 rows more for the picture's tokens."""
    network = on_meta(GEOMETRIES[name]())
    language = {
        id(weight): weight for part in (network.model.language_model, network.lm_head) for weight in part.parameters()
    }
    assert sum(weight.numel() for weight in language.values()) == decoder
    tower = sum(weight.numel() for weight in network.model.vision_tower.parameters())
    assert 0.39e9 < tower < 0.42e9, "SigLIP-so400m without its last layer"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_operations_are_those_that_the_model_runs(name: str) -> None:
    config = GEOMETRIES[name]()
    network, text, vision = on_meta(config), config.text_config, config.vision_config
    tokens, tiles = 48, 2
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        network.model.language_model(inputs_embeds=torch.empty(1, tokens, text.hidden_size, device="meta"))
    # Eager attention computes the half that is masked, too.
    masked = 2 * tokens**2 * text.hidden_size * text.num_hidden_layers
    assert counted.get_total_flops() == prefill_flops(config, [tokens], [text.num_hidden_layers]) + masked
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        pixels = torch.empty(tiles, 3, vision.image_size, vision.image_size, device="meta")
        network.model.vision_tower(pixels)
        features = torch.empty(tiles, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size, device="meta")
        network.model.multi_modal_projector(features)
    if name == "demo":  # its last tower layer feeds nothing, and is not run
        assert tower_flops(config, tiles) < counted.get_total_flops() < 1.25 * tower_flops(config, tiles)
    else:
        assert counted.get_total_flops() == tower_flops(config, tiles)
    matrices = [weight for weight in network.model.language_model.layers.parameters() if weight.dim() == 2]
    head = network.lm_head.weight.numel()
    assert decoder_weights(config) == sum(weight.numel() for weight in matrices) + head


def test_operations_of_a_tower_that_merges_patches() -> None:
    """Rotating queries and keys is not counted; all else in the tower is a product of matrices."""
    device, picture = torch.device("cpu"), geometry.random_picture(96)
    model = random_model("qwen3-vl-tiny", device, torch.float32)
    model.network.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted:
        (encoded,) = model.encode([picture])
    assert counted.get_total_flops() == encoding_flops(model.network.config, *encoded.pixels.shape[:3])


def test_the_published_size_of_qwen3_vl() -> None:
    """8,767,123,696 parameters, as the published checkpoint has."""
    with torch.device("meta"):
        network = Qwen3VLForConditionalGeneration(SHAPES["qwen3-vl-8b"]())
    assert sum(weight.numel() for weight in network.parameters()) == 8_767_123_696


def test_bounds() -> None:
    peak = DevicePeak(flops=1e9, bandwidth=1e6)
    assert peak.bound_ms(flops=2e9, bytes_moved=0) == 2000
    assert peak.bound_ms(flops=0, bytes_moved=500) == 0.5
    device = torch.device("cpu")
    assert best_seconds(lambda: None, device) < 1 and median_ms(lambda: None, device, 3) < 1000


def test_the_geometry_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--geometry", "demo", "--picture", "300", "--runs", "1", "--decode-steps", "1", "--threads", "1"]
    assert geometry.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["retention"] for row in rows] == ["100%", "50%", "25%", "10%"]
    text: Any = GEOMETRIES["demo"]().text_config
    head_dim = text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_key_value_heads * head_dim * 4
    spans = Strategy.preset(0.1, text.num_hidden_layers).spans(text.num_hidden_layers)
    whole = rows[0]["visual_tokens"] * text.num_hidden_layers * token_bytes
    assert (rows[0]["kept_tokens"], rows[0]["kv_bytes"]) == ([rows[0]["visual_tokens"]], whole)
    for row, budget in zip(rows[1:], (0.5, 0.25, 0.1), strict=True):
        kept = sum(count * span for count, span in zip(row["kept_tokens"], spans, strict=True))
        assert row["kv_bytes"] == kept * token_bytes <= row["kv_bytes_held"]
        assert row["kv_share"] == pytest.approx(row["kv_bytes"] / whole)
        assert budget - 0.02 < row["kv_share"] <= budget
        assert row["prefill_bound_ms"] < rows[0]["prefill_bound_ms"]
    times = ("encode_ms", "encode_bound_ms", "score_ms", "prune_and_recycle_ms", "prefill_ms", "prefill_bound_ms")
    assert all(row[key] > 0 for row in rows for key in (*times, "decode_step_ms", "decode_bound_ms"))
    printed = capsys.readouterr().out
    assert "300 x 300" in printed and "A100" not in printed


def test_the_scoring_table(tmp_path: Path) -> None:
    arguments = ["--geometry", "demo", "--runs", "1", "--threads", "1", "--json", str(tmp_path / "rows.json")]
    assert scoring.main(arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    wanted = [("demo", budget, name) for budget in ("50%", "25%", "10%") for name in ("preset", "diverse")]
    assert [(row["model"], row["retention"], row["strategy"]) for row in rows] == wanted
    for row in rows:
        added = row["score_ms"] + row["choose_and_recycle_ms"]
        assert row["share_of_encoding"] == pytest.approx(added / row["encode_ms"])
        assert (row["recycled_tokens"] > 0) == (row["strategy"] == "preset") and row["prune_ms"] > 0


def test_the_demo_geometry_is_the_embedded_models() -> None:
    assert GEOMETRIES["demo"]().to_dict() == LlavaOnevisionConfig.from_pretrained(model_path()).to_dict()
