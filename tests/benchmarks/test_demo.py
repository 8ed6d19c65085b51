"""``make demo`` as a person runs it: a real service, a conversation, a table and a figure."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import demo


def services() -> list[str]:
    """Command lines of the services that run on this machine."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if "serve --port 0 --log-level warning" in line]


def test_the_bundled_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "figure.png"
    before = services()
    assert demo.main(["--out", str(figure)]) == 0
    printed = capsys.readouterr().out
    for row in ("visual tokens before", "kept per stage", "recycled", "KV bytes", "encode, ms", "turn 5: prefill"):
        assert row in printed
    assert "1,312" in printed
    with Image.open(figure) as drawn:
        assert drawn.width > 1000 and len(drawn.convert("RGB").getcolors(1 << 24)) > 1000
    assert services() == before, "the demo left a service behind"


def test_a_picture_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 400, 3), dtype=np.uint8)).save(mine)
    assert demo.main(["--image", str(mine), "--question", "What is it?", "--out", str(tmp_path / "out.png")]) == 0
    assert "400 x 150" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_what_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert demo.main(["--image", str(tmp_path / "notes.txt")]) == 2
    assert demo.main(["--image", str(tmp_path / "missing.png")]) == 2
    assert "cannot read" in capsys.readouterr().err
