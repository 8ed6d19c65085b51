"""The type of the vision tower that the service chooses, and says in its log."""

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from tests.vflowopt.models.tiny_qwen_vl import QWEN2_VL
from vflow_server import tower_dtype
from vflow_server.settings import Settings
from vflow_server.tower_dtype import choose_tower_dtype
from vflowopt.demo import model_path
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture
def runtime() -> Runtime:
    return Runtime.load(model_path(), kv_budget=32 << 20)


@pytest.mark.parametrize(("faster", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_it_is_bfloat16_where_the_processor_has_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, faster: bool, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(tower_dtype, "bfloat16_is_faster", lambda *_: faster)
    monkeypatch.setattr(tower_dtype, "_MOST_SECONDS", 600.0)
    with capture_logs() as lines:
        choose_tower_dtype(runtime)
    assert runtime.model.tower_dtype == chosen
    (line,) = lines
    if faster:
        assert line["tower_dtype"] == "bfloat16" and line["answers"] == 1.0
        assert 0.99 < line["rank_correlation"] < 1.0 and 0.9 <= line["overlap"] <= 1.0
    else:
        assert "float32" in line["event"]


@pytest.mark.parametrize("because", ["seconds", "memory"])
def test_it_stays_float32_where_it_cannot_be_compared(monkeypatch: pytest.MonkeyPatch, because: str) -> None:
    runtime = Runtime.load(model_path(), kv_budget=(64 << 10) if because == "memory" else (32 << 20))
    monkeypatch.setattr(tower_dtype, "bfloat16_is_faster", lambda *_: True)
    monkeypatch.setattr(tower_dtype, "_MOST_SECONDS", 600.0 if because == "memory" else 0.0)
    with capture_logs() as lines:
        choose_tower_dtype(runtime)
    assert runtime.model.tower_dtype == torch.float32 and "stays in float32" in lines[0]["event"]
    assert runtime.pool.bytes_used == 0


def test_a_family_whose_tower_has_the_decoders_type(tmp_path: Path) -> None:
    runtime = Runtime.load(QWEN2_VL[0].save(tmp_path), kv_budget=32 << 20)
    with capture_logs() as lines:
        choose_tower_dtype(runtime)
    assert runtime.model.tower_dtype == torch.float32 and "of the decoder's type" in lines[0]["event"]


def test_the_service_chooses_unless_it_is_told() -> None:
    assert Settings().tower_dtype == "auto"
