"""What decoding in a worker costs, measured once for the small pictures."""

import json
from pathlib import Path

from benchmarks import decoding


def test_a_run(tmp_path: Path) -> None:
    assert decoding.main(["--repeats", "1", "--largest", "1", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["picture"] for row in rows] == ["448 x 448 PNG", "1 megapixel JPEG"]
    assert all(row["in_process_ms"] > 0 and row["in_worker_ms"] > 0 for row in rows)
