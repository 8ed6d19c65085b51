"""Models that cannot be served are refused with a reason and the way out; number types load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vflowopt.generation import Chat, picture
from vflowopt.compression.strategy import Strategy
from vflowopt.models.error import ModelError
from vflowopt.models.families import FAMILIES
from vflowopt.models.loading import load_model
from vflowopt.runtime.model_runner import Runtime


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder") as refused:
        load_model(tmp_path / "nowhere")
    assert refused.value.reason == "MODEL_NOT_FOUND"


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)


def test_an_unknown_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="'bert'") as refused:
        load_model(tmp_path)
    assert refused.value.reason == "MODEL_FAMILY_UNKNOWN"
    assert all(family in str(refused.value) for family in FAMILIES)


def test_a_folder_without_weights(plain_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(plain_folder, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="does not load") as refused:
        load_model(folder)
    assert refused.value.reason == "MODEL_UNREADABLE"


def test_a_folder_that_lacks_some_weights(plain_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(plain_folder, folder)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.3" in name)
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 .*layers\.3") as refused:
        load_model(folder)
    assert refused.value.reason == "MODEL_UNREADABLE"


def test_a_tower_that_is_not_supported(plain_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "default"
    shutil.copytree(plain_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_feature_select_strategy"] = "default"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="vision_feature_select_strategy"):
        load_model(folder)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 3}, "sliding-window layers"),
        ({"rope_parameters": LONGROPE}, "rotary embeddings of type 'longrope'"),
        ({"model_type": "qwen2_moe"}, "decoder of the family 'qwen2_moe'.*supported: "),
        ({"model_type": "gemma2"}, "decoder of the family 'gemma2'"),
    ],
    ids=["sliding", "longrope", "experts", "other"],
)
def test_a_decoder_that_would_answer_wrongly(
    plain_folder: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as refused:
        load_model(folder)
    assert refused.value.reason == "MODEL_UNSUPPORTED"


TEXT_ONLY = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] }}{% endfor %}"
"""A template of a language model: contents are strings."""


def with_strategies(plain_folder: Path, folder: Path, strategies: object) -> Path:
    shutil.copytree(plain_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vflow_strategies": strategies}))
    return folder


def test_a_model_brings_strategies(plain_folder: Path, tmp_path: Path) -> None:
    strategy = Strategy.preset(0.25, 6)
    folder = with_strategies(plain_folder, tmp_path / "model", {"tuned-25": json.loads(strategy.to_json())})
    assert load_model(folder).strategies == {"tuned-25": strategy}
    assert load_model(plain_folder).strategies == {}


def test_a_strategy_that_does_not_fit_the_model_it_came_with(plain_folder: Path, tmp_path: Path) -> None:
    too_deep = json.loads(Strategy((0, 9), (0.5, 0.5)).to_json())
    folder = with_strategies(plain_folder, tmp_path / "model", {"tuned-25": too_deep})
    with pytest.raises(ModelError, match="'tuned-25' under vflow_strategies"):
        load_model(folder)


def test_strategies_that_are_not_an_object(plain_folder: Path, tmp_path: Path) -> None:
    folder = with_strategies(plain_folder, tmp_path / "model", [json.loads(Strategy.preset(0.25, 6).to_json())])
    with pytest.raises(ModelError, match="not an object of strategies by name; correct it"):
        load_model(folder)


@pytest.mark.parametrize("template", [None, TEXT_ONLY, "{{ 'no picture' }}"])
def test_a_chat_template_that_takes_no_pictures(plain_folder: Path, tmp_path: Path, template: str | None) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(plain_folder, folder)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match="chat template") as refused:
        load_model(folder)
    assert refused.value.reason == "MODEL_UNSUPPORTED"


def test_the_processors_chat_template_of_older_folders_goes_first(plain_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(plain_folder, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(TEXT_ONLY)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_model(folder).tokenizer.chat_template == template


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(plain_folder: Path, dtype: str) -> None:
    runtime = Runtime.load(plain_folder, dtype=dtype, kv_budget=1 << 22)
    assert runtime.pool.keys.dtype == getattr(torch, dtype)
    chat = Chat(runtime, Strategy.preset(0.1, 6))
    assert chat.ask([picture(80, 80, 0), "hi"], 4)
    assert all(logits.isfinite().all() for logits in chat.logits)
    chat.sequence.release()


def test_an_unknown_dtype_and_a_missing_gpu(plain_folder: Path) -> None:
    with pytest.raises(ModelError, match="float32, bfloat16, float16"):
        load_model(plain_folder, dtype="int4")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no GPU"):
            load_model(plain_folder, device="cuda")


def test_the_revision_tells_weights_apart(plain_folder: Path, tmp_path: Path) -> None:
    from tests.vflowopt.tiny_models import SHAPES, save

    other = Runtime.load(save(SHAPES[0], tmp_path, seed=1), kv_budget=1 << 20)
    same = Runtime.load(plain_folder, kv_budget=1 << 20)
    assert Runtime.load(plain_folder, kv_budget=1 << 21).revision == same.revision != other.revision
