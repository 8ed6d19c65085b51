"""How decoding scales, measured once for few tokens."""

import json
from pathlib import Path

from benchmarks import batching


def test_a_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert batching.main(["--repeats", "1", "--new-tokens", "2", "--conversations", "1,3", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [row["conversations"] for row in rows] == [1, 3]
    for place in ("library", "engine", "grpc"):
        assert all(row[f"{place}_tokens_per_second"] > 0 for row in rows)
        assert rows[0][f"{place}_times_the_first"] == 1
