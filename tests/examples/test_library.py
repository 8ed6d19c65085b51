"""The examples of the library, on the embedded model."""

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.examples.run import EXAMPLES, run
from vflowopt.demo import picture_path


def test_the_quickstart_answers_twice(capsys: pytest.CaptureFixture[str]) -> None:
    run("library_quickstart.py")
    assert capsys.readouterr().out.splitlines() == ["arrow", "center"]


def test_the_quickstart_has_at_most_ten_lines() -> None:
    _, *code = ast.parse((EXAMPLES / "library_quickstart.py").read_text()).body
    assert len({line for each in code for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)}) <= 10


def test_a_loaded_model_answers_and_still_generates(capsys: pytest.CaptureFixture[str]) -> None:
    run("loaded_model.py")
    answer, kept, generated = capsys.readouterr().out.splitlines()
    assert answer == "arrow"
    assert kept.startswith("1312 visual tokens, kept per stage: ")
    assert generated


def test_a_drawing_shows_what_each_stage_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kept.png"
    run("draw_strategy.py", str(picture_path() / "cat.png"), "--out", str(file))
    assert capsys.readouterr().out == f"{file}: of 1312 tokens the stages keep 170, 162, 61\n"
    with Image.open(picture_path() / "cat.png") as picture, Image.open(file) as drawing:
        pixels, (width, height) = np.asarray(picture.convert("RGB")), picture.size
        assert drawing.size == (3 * width, 2 * height)
        sheet = np.asarray(drawing)
    # Each stage shows fewer pixels of the picture as they are, and the mosaic some in its last stage, too.
    shown = [
        [
            int((sheet[row * height :][:height, column * width :][:, :width] == pixels).all(-1).sum())
            for column in range(3)
        ]
        for row in range(2)
    ]
    assert all(first >= second > third > 0 for first, second, third in shown)


def test_a_drawing_of_a_strategy_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("draw_strategy.py", "--strategy", "none")
    assert "choose one of full, diverse-" in capsys.readouterr().err


def test_the_readme_names_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for file in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*/chat.js")):
        assert str(file.relative_to(EXAMPLES)) in readme
