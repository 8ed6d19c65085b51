"""Quantized weights: what Hugging Face's own quantized model answers, and the errors where they cannot be used."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from tests.vflowopt.generation import Chat, picture
from tests.vflowopt.models.tiny_qwen_vl import QWEN2_5_VL
from tests.vflowopt.reference import Reference
from tests.vflowopt.tiny_models import Shape
from vflowopt.compression.strategy import Strategy
from vflowopt.models.error import ModelError
from vflowopt.models.loading import load_model
from vflowopt.runtime.decoder import ModuleDecoder
from vflowopt.runtime.model_runner import Runtime

TURN = [picture(70, 150, 1), "what is this?"]
# bitsandbytes has kernels for some widths only, which all published models have.
WIDE = (
    Shape("plain", tower_width=64, tower_heads=2),
    replace(
        QWEN2_5_VL[0],
        vision={**QWEN2_5_VL[0].vision, "hidden_size": 64, "intermediate_size": 64},
        text={"intermediate_size": 128},
    ),
)
CONFIGS = {"8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


@pytest.fixture
def quantizers() -> None:
    """Skips where they are not installed: they are an extra of their own."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")


@pytest.mark.usefixtures("quantizers")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("model", WIDE, ids=lambda model: model.name)
def test_a_quantized_model_reads_a_prompt_like_hugging_faces(model: Any, name: str, tmp_path: Path) -> None:
    """Kernels of quantized weights round by the shape of a batch: answers drift apart, the prompt's logits do not."""
    folder = model.save(tmp_path / "model")
    reference, whole = Reference(folder), Reference(folder)
    reference.network = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**CONFIGS[name]),
        device_map={"": "cpu"},
    )
    saved = shutil.copytree(folder, tmp_path / "quantized")
    reference.network.save_pretrained(saved)  # as published checkpoints come
    for each in (reference, whole):
        each.answers([TURN], 1)
    revisions = {Runtime.load(folder, kv_budget=1 << 20).revision}
    for loaded in (
        Runtime.load(folder, quantization=name, kv_budget=32 << 20),
        Runtime.load(saved, kv_budget=32 << 20),
    ):
        assert loaded.model.quantized and isinstance(loaded.decoder, ModuleDecoder)
        assert loaded.model.layers[0].self_attn.o_proj.weight.dtype in (torch.int8, torch.uint8)
        chat = Chat(loaded, Strategy.full())
        chat.ask(TURN, 1)
        assert torch.cosine_similarity(chat.logits[0], reference.logits[0], dim=0) > 0.9999
        assert torch.cosine_similarity(chat.logits[0], whole.logits[0], dim=0) < 0.9995
        chat.sequence.release()
        pruned = Chat(loaded, Strategy.preset(0.25, loaded.layers))
        assert pruned.ask(TURN, 3) and pruned.logits[-1].isfinite().all()
        pruned.sequence.release()
        revisions.add(loaded.revision)
    assert len(revisions) == 2, "quantized, it is another model, however its weights came to be so"
    with pytest.raises(ModelError, match="quantized already"):
        load_model(saved, quantization=name)


@pytest.mark.usefixtures("quantizers")
@pytest.mark.filterwarnings("ignore")  # of what it imports, and of its kernels that are not there
def test_weights_that_are_tensors_of_another_type_are_read_too(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    folder = WIDE[0].save(tmp_path / "model")
    reference = Reference(folder)
    configuration = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    reference.network = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, quantization_config=configuration, device_map={"": "cpu"}
    )
    saved = shutil.copytree(folder, tmp_path / "quantized")
    reference.network.save_pretrained(saved)
    runtime = Runtime.load(saved, kv_budget=32 << 20)
    assert isinstance(runtime.decoder, ModuleDecoder)
    chat = Chat(runtime, Strategy.full())
    assert [chat.ask(TURN, 6)] == reference.answers([TURN], 6)
    chat.sequence.release()


def test_an_unknown_quantization_is_refused(plain_folder: Path) -> None:
    with pytest.raises(ModelError, match="'2bit'; choose one of 8bit, 4bit") as refused:
        load_model(plain_folder, quantization="2bit")
    assert refused.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize("published", [False, True], ids=["asked-for", "of-the-checkpoint"])
@pytest.mark.parametrize("missing", ["accelerate", "bitsandbytes"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantizer_that_is_not_installed_is_asked_for(
    name: str, missing: str, published: bool, plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"accelerate": missing == "bitsandbytes", "bitsandbytes": False}
    hugging_faces = f"transformers.quantizers.quantizer_bnb_{name}"
    for module in ("vflowopt.models.quantization", "transformers.integrations.accelerate", hugging_faces):
        monkeypatch.setattr(f"{module}.is_accelerate_available", lambda *_: there["accelerate"])
    monkeypatch.setattr(f"{hugging_faces}.is_bitsandbytes_available", lambda *_: there["bitsandbytes"])
    folder = shutil.copytree(plain_folder, tmp_path / "model")
    if published:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", **CONFIGS[name]}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{missing}.*pip install 'vflow") as refused:
        load_model(folder, quantization=None if published else name)
    assert refused.value.reason == "MODEL_UNSUPPORTED" and "not installed" in str(refused.value)
