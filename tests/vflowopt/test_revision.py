"""The revision of a model: it changes with whatever an answer depends on, and with nothing else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, LlavaOnevisionForConditionalGeneration

from vflowopt.models import revision as revisions
from vflowopt.models.error import ModelError
from vflowopt.models.loading import load_model, wrap_model
from vflowopt.models.revision import earlier_revisions, revision


@pytest.fixture
def folder(plain_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_folder, tmp_path / "model"))


def of(folder: Path, **options: str) -> str:
    return revision(load_model(folder, **options))


def changed(file: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Change the JSON document in ``file``."""

    def apply(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        change(document)
        (folder / file).write_text(json.dumps(document))

    return apply


def one_value(place: float) -> Callable[[Path], object]:
    """Change one bit of the weights, and nothing that a listing of the folder shows."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        before = file.stat()
        content = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        content[begin + int(place * (len(content) - begin - 1)) & ~1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return apply


def rewritten(file: str, old: str, new: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return apply


MATTERS: dict[str, Callable[[Path], object]] = {
    "the first value": one_value(0),
    "a value in the middle": one_value(0.5),
    "the last value": one_value(1),
    "the configuration": changed("config.json", lambda config: config["text_config"].update(rms_norm_eps=1e-3)),
    "the scoring layer": changed("config.json", lambda config: config.update(vflow_scoring_layer=0)),
    "the chat template": rewritten("chat_template.jinja", "assistant\n", "assistant: "),
    "the tokenizer": changed("tokenizer.json", lambda document: document["model"]["vocab"].update(a=66, b=65)),
    "its configuration": changed("tokenizer_config.json", lambda config: config.update(add_prefix_space=True)),
    "added tokens": lambda folder: (folder / "added_tokens.json").write_text('{"<more>": 261}'),
    "the preprocessor": changed("preprocessor_config.json", lambda config: config.update(image_mean=[0.5, 0.5, 0.4])),
    "where an answer ends": changed("generation_config.json", lambda config: config.update(eos_token_id=65)),
}


@pytest.mark.parametrize("change", MATTERS.values(), ids=MATTERS)
def test_what_an_answer_depends_on_changes_it(folder: Path, change: Callable[[Path], object]) -> None:
    before = of(folder)
    change(folder)
    assert of(folder) != before


def test_the_type_of_the_weights_changes_it(folder: Path) -> None:
    assert len({of(folder, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}) == 3


def in_another_order(folder: Path) -> None:
    for file in folder.glob("*.json"):
        document = json.loads(file.read_text())
        file.write_text(json.dumps(dict(reversed(document.items())), indent=7))


def of_another_version(folder: Path) -> None:
    for file in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        changed(file, lambda document: document.update(transformers_version="9.9.9", _name_or_path="elsewhere"))(folder)
    changed("config.json", lambda document: document.update(architectures=["Other"], torch_dtype="float16"))(folder)
    changed("preprocessor_config.json", lambda document: document.update(processor_class="Other"))(folder)


def saved_again(folder: Path) -> None:
    """By the library, in several files of weights."""
    network = LlavaOnevisionForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1


def template_elsewhere(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    changed("tokenizer_config.json", lambda config: config.update(chat_template=template))(folder)


NOISE: dict[str, Callable[[Path], object]] = {
    "order and space": in_another_order,
    "notes of another version": of_another_version,
    "saved again": saved_again,
    "the template elsewhere": template_elsewhere,
    "a strategy": changed("config.json", lambda config: config.update(vflow_strategies={})),
    "a file beside": lambda folder: (folder / "README.md").write_text("A model."),
    "times": lambda folder: [os.utime(file, (1, 1)) for file in folder.iterdir()],
}


@pytest.mark.parametrize("change", NOISE.values(), ids=NOISE)
def test_nothing_else_does(folder: Path, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(folder)
    change(folder)
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    assert of(folder) == before


@pytest.mark.parametrize("writable", [True, False])
def test_large_files_are_read_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(revisions, "_LARGE", 1)
    monkeypatch.setattr(revisions, "_SETTLED", -1)
    if not writable:
        (folder / revisions._DIGESTS).mkdir()  # as good as a folder that cannot be written to, for root as well
    model = load_model(folder)
    first = revision(model)
    with monkeypatch.context() as context:
        context.setattr(revisions, "_digests_of_weights", None)
        assert revision(model) == first
    assert (folder / revisions._DIGESTS).is_file() is writable is not (tmp_path / "cache").exists()
    one_value(0.5)(folder)
    assert revision(model) != first
    for place in (folder, tmp_path / "cache" / "vflow"):
        for kept in place.glob("*digests*.json"):
            if kept.is_file():
                kept.write_text('{"schema": 1, "files": [')
    one_value(0.5)(folder)
    assert revision(model) == first


def test_a_file_that_has_just_changed_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions, "_LARGE", 1)
    model = load_model(folder)
    first = revision(model)
    # Within one tick of the clock of the file system, a second change leaves the times as they are.
    assert not (folder / revisions._DIGESTS).exists()
    one_value(1)(folder)
    assert revision(model) != first


def test_a_model_that_is_wrapped_has_one_too(folder: Path) -> None:
    network = LlavaOnevisionForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = wrap_model(network, tokenizer, processor)
    first = revision(model)
    assert revision(wrap_model(network, tokenizer, processor)) == first
    with torch.no_grad():
        network.lm_head.weight[-1, -1] += 1
    assert revision(model) != first


def test_weights_that_are_gone_are_told(folder: Path) -> None:
    model = load_model(folder)
    assert load_file(folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ModelError, match="cannot be read any more"):
        revision(model)


def test_the_type_of_the_vision_tower_counts(folder: Path) -> None:
    model = load_model(folder)
    first = revision(model)
    assert revision(model, tower_dtype=torch.float32) == first
    model.set_tower_dtype(torch.bfloat16)
    assert revision(model) != first == revision(model, tower_dtype=torch.float32)
    assert first in earlier_revisions(model, b"") and revision(model) not in earlier_revisions(model, b"")
