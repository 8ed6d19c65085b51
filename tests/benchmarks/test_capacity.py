"""Filling a small KV budget with conversations."""

import json
from pathlib import Path

from benchmarks import capacity


def test_filling(tmp_path: Path) -> None:
    arguments = ["--kv-budget", "5MiB", "--retention", "100%", "10%", "--new-tokens", "2"]
    assert capacity.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    whole, pruned = json.loads((tmp_path / "rows.json").read_text())
    assert (whole["retention"], whole["resident_conversations"]) == ("100%", 1)
    assert pruned["retention"] == "10%"
    for row in (whole, pruned):
        fitting = 5 * (1 << 20) / row["kv_bytes_per_conversation"]
        # What prefixes hold for sharing goes first, so that the budget is full of conversations.
        assert fitting - 2 < row["resident_conversations"] <= fitting
    assert pruned["visual_kv_bytes_per_conversation"] <= 0.11 * whole["visual_kv_bytes_per_conversation"]


def test_a_budget_too_small_for_one() -> None:
    assert capacity.main(["--kv-budget", "1MiB", "--retention", "100%", "--new-tokens", "2"]) == 1
