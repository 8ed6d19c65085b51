"""Streaming beside a search, at the smallest size."""

import json
from pathlib import Path

from benchmarks import retune_under_load


def test_both_kinds_of_rounds_are_measured(tmp_path: Path) -> None:
    sizes = ["--streams", "2", "--rounds", "1", "--new-tokens", "40", "--samples", "1", "--budget", "0.2"]
    assert retune_under_load.main([*sizes, "--json", str(tmp_path / "rows.json")]) == 0
    alone, beside = json.loads((tmp_path / "rows.json").read_text())
    assert (alone["conversations"], beside["conversations"]) == ("alone", "beside a search")
    for row in (alone, beside):
        assert 20 < row["tokens"] <= 2 * 39 and 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert alone["trials"] == 0
