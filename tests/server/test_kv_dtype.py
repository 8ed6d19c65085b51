"""A KV cache that is stored in a type of its own: what the setting does, and that such caches go nowhere else."""

from pathlib import Path

import pytest
import torch

from tests.server.conftest import Serve
from vflow_client import ModelChanged
from vflow_server import app
from vflow_server.settings import Settings
from vflowopt.runtime.model_runner import KV_DTYPES, Runtime


@pytest.mark.parametrize("name", ["auto", *KV_DTYPES])
def test_the_pool_has_the_type_of_the_setting(model_folder: Path, name: str) -> None:
    pool = app._load(Settings(model=str(model_folder), kv_budget=1 << 20, kv_dtype=name)).pool
    assert pool.keys.dtype == KV_DTYPES.get(name, torch.float32)
    assert pool.bytes_total <= 1 << 20 < pool.bytes_total + pool.page_bytes


def test_sessions_outlive_a_restart_with_the_same_type_alone(
    model_folder: Path, runtime: Runtime, picture: bytes, serve_data: Serve
) -> None:
    fp8 = Runtime.load(model_folder, kv_budget=8 << 20, kv_dtype="fp8_e4m3")
    fp8.chat.stop_ids = frozenset()
    served = serve_data(fp8)
    session = served.client.session("preset-25")
    receipt = session.add_image(picture)
    assert receipt.kv_bytes and receipt.kv_bytes % fp8.bytes_per_token() == 0
    assert fp8.bytes_per_token() * 4 == runtime.bytes_per_token()
    session.ask("What is this?", max_new_tokens=6).read()
    expected = session.fork().ask("Why?", max_new_tokens=6).read()
    again = serve_data(fp8).client.attach(session.name).ask("Why?", max_new_tokens=6)
    assert again.read() == expected
    assert again.receipt.RestoredFrom.Name(again.receipt.restored_from) == "DISK"
    with pytest.raises(ModelChanged):
        serve_data(runtime).client.attach(session.name).ask("And?").read()
