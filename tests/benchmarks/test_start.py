"""How long a start takes, measured once."""

import json
from pathlib import Path

from benchmarks import start


def test_a_run(tmp_path: Path) -> None:
    assert start.main(["--starts", "1", "--byte-code", "found", "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert 0 < row["first_log_cpu_s"] < row["ready_cpu_s"]
    assert 0 < row["first_log_wall_s"] < row["ready_wall_s"]
