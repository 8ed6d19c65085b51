"""How much memory a share is a share of."""

from pathlib import Path

import pytest
import torch

from vflow_server import app
from vflow_server.kv import memory
from vflow_server.option import Share
from vflow_server.settings import Settings


def limited(folder: Path, limit: str, used: int, files: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\n")
    return folder


@pytest.mark.parametrize(
    ("limit", "used", "files", "left"),
    [("1000", 600, 100, [500]), ("1000", 1100, 0, [0]), ("max", 600, 100, [])],
    ids=["a limit", "exceeded", "no limit"],
)
def test_what_a_container_leaves(tmp_path: Path, limit: str, used: int, files: int, left: list[int]) -> None:
    assert memory._left_in_container(limited(tmp_path, limit, used, files)) == left


def test_the_host_has_some_and_a_tighter_container_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert 1 << 20 < memory.available_memory(cpu) < 1 << 50
    limited(tmp_path, "5000", 1000, 0)
    assert memory.available_memory(cpu) == 4000


def test_a_share_is_of_what_is_available(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "available_memory", lambda device: 8 << 20)
    assert Settings().kv_budget == Share(25)
    runtime = app._load(Settings(model=str(model_folder)))
    assert runtime.pool.bytes_total <= 2 << 20 < runtime.pool.bytes_total + runtime.pool.page_bytes
