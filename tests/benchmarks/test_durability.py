"""What a data folder costs, at the smallest size."""

import json
from pathlib import Path

from benchmarks import durability


def test_a_run(tmp_path: Path) -> None:
    arguments = ["--at-once", "1", "--rounds", "1", "--turns", "2", "--new-tokens", "2", "--data", str(tmp_path)]
    assert durability.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["turns"] for row in rows] == [2, 2, 1, 1]
    assert all(row["turn_ms_p50"] > 0 for row in rows)
    stopped, crashed = (row["bytes_per_conversation"] for row in rows[2:])
    assert stopped > crashed + 100_000, "KV caches are larger than what they are computed from"
    assert crashed > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "the data folder is gone"
