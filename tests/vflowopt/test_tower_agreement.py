"""A tower in bfloat16 is taken if it agrees with the one in float32, and else leaves no trace."""

from pathlib import Path

import pytest
import torch

from tests.vflowopt.models.tiny_qwen_vl import QWEN2_VL
from vflowopt.demo import model_path, picture_path
from vflowopt.media.picture import Picture
from vflowopt.models.error import ModelError
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.tower_agreement import TowerAgreement, compare_towers

PICTURES = [Picture.decode((picture_path() / name).read_bytes()) for name in ("cat.png", "photographer.png")]
QUESTION = "What is in the picture?"


@pytest.fixture
def runtime() -> Runtime:
    return Runtime.load(model_path(), kv_budget=32 << 20)


def test_towers_that_agree(runtime: Runtime) -> None:
    revision = runtime.__class__.revision.func(runtime)  # type: ignore[attr-defined]
    agreement = compare_towers(runtime, torch.bfloat16, PICTURES, QUESTION, most_seconds=600)
    assert agreement is not None and agreement.suffices
    assert 0.99 < agreement.rank_correlation < 1.0 and agreement.answers == 1.0
    assert runtime.model.tower_dtype == torch.bfloat16 and runtime.model.dtype == torch.float32
    assert runtime.pool.bytes_used == 0
    assert runtime.revision != revision and revision in runtime.earlier_revisions()


def test_towers_that_do_not_agree(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = runtime.model.network.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-6  # not of bfloat16's
    before = runtime.model.encode(PICTURES)
    monkeypatch.setattr(TowerAgreement, "suffices", False)
    assert compare_towers(runtime, torch.bfloat16, PICTURES, QUESTION, most_seconds=600) is not None
    assert runtime.model.tower_dtype == torch.float32
    for found, expected in zip(runtime.model.encode(PICTURES), before, strict=True):
        assert torch.equal(found.embeddings, expected.embeddings) and torch.equal(found.query, expected.query)


def test_a_comparison_that_would_take_too_long(runtime: Runtime) -> None:
    assert compare_towers(runtime, torch.bfloat16, PICTURES, QUESTION, most_seconds=0) is None
    assert runtime.model.tower_dtype == torch.float32 and runtime.pool.bytes_used == 0


def test_a_model_without_such_a_tower(tmp_path: Path) -> None:
    runtime = Runtime.load(QWEN2_VL[0].save(tmp_path), kv_budget=32 << 20)
    with pytest.raises(ModelError):
        compare_towers(runtime, torch.bfloat16, PICTURES, QUESTION, most_seconds=600)
    assert runtime.model.tower_dtype == torch.float32 and runtime.pool.bytes_used == 0


@pytest.mark.parametrize(
    "agreement", [TowerAgreement(0.98, 1, 1), TowerAgreement(1, 0.89, 1), TowerAgreement(1, 1, 0.99)]
)
def test_what_does_not_suffice(agreement: TowerAgreement) -> None:
    assert not agreement.suffices
