"""What a data folder costs, at the smallest size."""

import json
from pathlib import Path

from benchmarks import durability


def test_a_run(tmp_path: Path) -> None:
    arguments = ["--at-once", "1", "--rounds", "1", "--turns", "2", "--new-tokens", "2", "--data", str(tmp_path)]
    assert durability.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    memory, folder, restarted = json.loads((tmp_path / "rows.json").read_text())
    assert [row["turns"] for row in (memory, folder, restarted)] == [2, 2, 1]
    assert all(row["turn_ms_p50"] > 0 for row in (memory, folder, restarted))
    assert restarted["bytes_per_conversation"] > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "the data folder is gone"
