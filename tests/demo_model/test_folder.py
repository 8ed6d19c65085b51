from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlavaOnevisionForConditionalGeneration

from demo_model.architecture import configuration, initialise
from demo_model.folder import hub_name, save_folder
from demo_model.tokenizer import build_tokenizer
from vflowopt.demo import model_path


def test_every_tensor_loads() -> None:
    _, report = LlavaOnevisionForConditionalGeneration.from_pretrained(model_path(), output_loading_info=True)
    assert not any(report.values()), report


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in model_path().iterdir()) <= 25_000_000


def test_tensors_have_the_hubs_names_and_are_bfloat16() -> None:
    with safe_open(model_path() / "model.safetensors", "pt") as file:
        for name in file.keys():
            assert name == "image_newline" or name.startswith(
                ("vision_tower.vision_model.", "language_model.model.", "multi_modal_projector.")
            )
            assert file.get_slice(name).get_dtype() == "BF16"


def test_a_tensor_without_a_hub_name_is_refused() -> None:
    with pytest.raises(KeyError, match="No hub name is known"):
        hub_name("model.audio_tower.weight")


def test_the_scoring_layer_is_named() -> None:
    config = AutoConfig.from_pretrained(model_path())
    assert config.vflow_scoring_layer == -1 and config.vision_feature_layer == -2
    assert config.vision_config.num_hidden_layers == 6 and config.text_config.num_hidden_layers == 6


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = initialise(configuration(len(tokenizer), 0, 1, 2, 3), seed=0)
    save_folder(model, tokenizer, tmp_path)
    again = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[name], tensor.to(torch.bfloat16).float())
