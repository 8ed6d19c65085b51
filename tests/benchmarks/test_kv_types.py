"""The comparison of the cache's types at its smallest size."""

import json
from pathlib import Path

import pytest

from benchmarks import kv_types


def test_rows_at_the_smallest_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--pictures",
        "2",
        "--turns",
        "1",
        "--new-tokens",
        "3",
        "--kv-budget",
        "64",
        "--types",
        "fp8_e4m3",
        "--retention",
        "0.1",
    ]
    assert kv_types.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    rows = {
        (row["method"], row["retention"]): row
        for row in json.loads((tmp_path / "rows.json").read_text())
        if row["turn"] == "all"
    }
    exact, near = rows["float32", 0.1], rows["fp8_e4m3", 0.1]
    assert exact["agreement"] == 1.0 and exact["versus"] is None and near["versus"] is not None
    assert near["kv_bytes"] * 4 == exact["kv_bytes"] and 0.99 < near["cosine"] < 1.0
    assert "fp8_e4m3 @ 10%" in capsys.readouterr().out
