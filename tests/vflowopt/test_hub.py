"""Models named by a hub id, where the hub is not reached. The tests reach none: HF_HUB_OFFLINE is set."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from vflowopt.models.error import ModelError
from vflowopt.models.loading import load_model
from vflowopt.models.model_folder import find_model


def test_a_model_in_the_cache_is_read_from_there(
    plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--owner--model"
    snapshot = cached / "snapshots" / ("0" * 40)
    shutil.copytree(plain_folder, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot.name)
    assert find_model("owner/model") == snapshot
    assert load_model("owner/model").tokenizer is not None


def test_a_model_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no model of this name is in the hub cache") as refused:
        load_model("owner/model")
    assert refused.value.reason == "MODEL_UNREACHABLE"


@pytest.mark.parametrize("name", ["a model", "owner/", "-model", "ünknown", "model.", ""])
def test_what_is_no_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a hub id|has no config") as refused:
        load_model(name)
    assert refused.value.reason == "MODEL_NOT_FOUND"
