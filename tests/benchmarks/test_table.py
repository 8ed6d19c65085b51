"""Rows as text and as JSON."""

import json
from pathlib import Path

import pytest

from benchmarks.table import publish, render


def test_a_table() -> None:
    rows = [
        {"system": "one", "turns_per_second": 1.5, "bytes": 1234567, "kept": [3, 2]},
        {"system": "another", "turns_per_second": None, "bytes": 0, "kept": []},
    ]
    assert render(rows).splitlines() == [
        "          turns                 ",
        "            per                 ",
        "system   second      bytes  kept",
        "-------  ------  ---------  ----",
        "one       1.500  1,234,567   3/2",
        "another       -          0      ",
    ]


def test_publishing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish([{"a": 1}, {"a": 2}], tmp_path / "new" / "rows.json")
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == [{"a": 1}, {"a": 2}]
    publish([{"a": 1}, {"a": 2}], None)
    assert capsys.readouterr().out == "a\n-\n1\n2\n" * 2
