"""What the way to the wire costs, measured once for a few tokens."""

import json
from pathlib import Path

from benchmarks.wire import __main__ as wire


def test_a_run(tmp_path: Path) -> None:
    few = ["--at-once", "2", "--new-tokens", "4", "--calls", "2", "--repeats", "0"]
    assert wire.main([*few, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["work"] for row in rows] == ["token, 2 at once", "small turn", "GetSession", "AddImage"]
    assert all(row["loop_us"] > 0 and row["loop_calls"] > 0 and row["per_second"] > 0 for row in rows)
    assert 0 < rows[0]["messages"] <= 1 and rows[0]["engine_us"] > 0
