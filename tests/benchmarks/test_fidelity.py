"""The fidelity table at its smallest size, and what its figures mean."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import fidelity
from benchmarks.answering import Reply
from benchmarks.asked_pictures import Asked, from_folder, generated
from benchmarks.bootstrap import difference, share
from benchmarks.fidelity_rows import Mark, Scores, compare, summary
from benchmarks.line_chart import line_chart, save
from vflow_client import load_samples
from vflowopt.compression.strategy import Strategy

KEYS = {"method", "retention", "turn", "accuracy", "low", "high", "agreement", "kv_bytes", "cosine", "kl_divergence"}
KEYS |= {"versus", "difference", "difference_low", "difference_high"}


def test_rows_at_the_smallest_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pictures", "2", "--turns", "2", "--retention", "0.1", "--new-tokens", "3"]
    chosen = ["vflowopt", "random", "downsampling", "fastv"]
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.svg")]
    assert fidelity.main([*arguments, "--methods", *chosen, *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["turn"]) for row in rows] == [
        (method, turn) for method in ("full", *chosen) for turn in ("single", "all", 1, 2)
    ]
    full = rows[0]
    for row in rows:
        assert set(row) >= KEYS
        assert row["low"] <= row["accuracy"] <= row["high"] and row["questions"] == (2 if row["turn"] in (1, 2) else 4)
        if row["method"] == "full":
            assert row["agreement"] == 1.0 and row["kl_divergence"] == 0.0
            assert row["cosine"] == pytest.approx(1.0, abs=1e-6) and row["retention"] == 1.0
        else:
            assert 0.08 * full["kv_bytes"] < row["kv_bytes"] <= 0.1 * full["kv_bytes"]
            assert row["kl_divergence"] > 0 and row["cosine"] < 1
            assert (row["versus"] is None) == (row["method"] == "vflowopt")
    printed = capsys.readouterr().out
    assert all(f"{method} @ 10%" in printed for method in chosen) and "fine" in printed
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f">{name}<" in drawn for name in (*chosen, "unpruned"))


def test_a_tower_of_another_type_on_the_same_questions(tmp_path: Path) -> None:
    arguments = ["--pictures", "1", "--turns", "1", "--retention", "0.1", "--new-tokens", "3"]
    methods = ["vflowopt-diverse", "vflowopt-diverse-bfloat16-tower"]
    rows = tmp_path / "rows.json"
    assert fidelity.main([*arguments, "--tower-dtype", "bfloat16", "--methods", *methods, "--json", str(rows)]) == 0
    cosine = {row["method"]: row["cosine"] for row in json.loads(rows.read_text()) if row["turn"] == "all"}
    assert set(cosine) == {"full", *methods} and cosine[methods[0]] != cosine[methods[1]]


def test_a_folder_of_one_s_own(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": "What colour is the background?", "answer": "Red", "group": "colours"},
        {"image": "a.png", "question": "How many circles are there?", "answer": "1"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (asked,) = from_folder(tmp_path, 10, 10)
    assert np.array_equal(asked.picture.pixels, drawn)
    assert [each.text for each in asked.questions] == [line["question"] for line in lines]
    assert asked.questions[0].answered_by(" red") and not asked.questions[0].answered_by("green")
    assert asked.questions[0].groups == ("colours",)
    (tmp_path / "mine.json").write_text(Strategy.preset(0.25, 6).to_json())
    arguments = ["--data", str(tmp_path), "--retention", "0.25", "--methods", "vflowopt"]
    files = ["--strategy", str(tmp_path / "mine.json"), "--json", str(tmp_path / "rows.json")]
    assert fidelity.main([*arguments, *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["questions"] for row in rows if row["turn"] == "all"} == {2}
    assert "colours" in rows[0]["groups"]
    ours, mine = ([row for row in rows if row["method"] == name] for name in ("vflowopt", "vflowopt-mine"))
    differing = {
        "method",
        "versus",
        "difference",
        "difference_low",
        "difference_high",
    }  # the strategy is the preset: all figures are the same
    assert len(ours) == len(mine) == 4
    for row, same in zip(ours, mine, strict=True):
        assert same["versus"] == "tie" and same["difference"] == 0.0
        assert {key: row[key] for key in row.keys() - differing} == {key: same[key] for key in row.keys() - differing}


def test_one_file_of_questions_serves_searches_and_comparisons(tmp_path: Path) -> None:
    """With true answers and without; without one, the unpruned model's answer counts as true."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": "What colour is the background?", "group": "colours"},
        {"image": "a.png", "question": "How many circles are there?", "answer": 1},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (sample,), (asked,) = load_samples(tmp_path), from_folder(tmp_path, 10, 10)
    assert list(sample.questions) == [each.text for each in asked.questions] == [line["question"] for line in lines]
    assert [each.answer for each in asked.questions] == ["", "1"]
    files = ["--data", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert fidelity.main([*files, "--retention", "25%", "--methods", "vflowopt"]) == 0
    full = [row for row in json.loads((tmp_path / "rows.json").read_text()) if row["method"] == "full"]
    assert all(row["accuracy"] >= 0.5 for row in full if row["turn"] == "all")  # its own answer to the first


def test_a_line_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "questions.jsonl").write_text('{"image": "a.png"}\n')
    assert fidelity.main(["--data", str(tmp_path), "--methods", "vflowopt"]) == 2
    assert "line 1: expected a text as 'question'" in capsys.readouterr().err
    assert fidelity.main(["--methods", "alchemy"]) == 2
    assert "no method is called alchemy" in capsys.readouterr().err


def test_generated_pictures_are_the_same_in_every_run() -> None:
    once, again = (list(generated(0, 2, 3)) for _ in range(2))
    assert [each.questions for each in once] == [each.questions for each in again]
    assert [each.picture.digest for each in once] == [each.picture.digest for each in again]
    (other,) = generated(1, 1, 3)
    assert other.picture.digest not in {each.picture.digest for each in once}


def test_what_is_compared_with_the_unpruned_model() -> None:
    whole = Reply("red", torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert compare(whole, whole) == (True, 1.0, 0.0)
    agrees, cosine, divergence = compare(Reply("blue", torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])), whole)
    p = 1 / (1 + np.e)
    assert not agrees and cosine == 0.0
    assert divergence == pytest.approx(p * np.log(p / (1 - p)) + (1 - p) * np.log((1 - p) / p))


def test_intervals_hold_what_they_should() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        hits, asked = rng.binomial(5, 0.7, 60).astype(float), np.full(60, 5.0)
        found = share(hits, asked)
        assert found.value == hits.sum() / asked.sum()
        held += found.low <= 0.7 <= found.high
    assert 88 <= held <= 100


def test_ties_are_differences_within_the_interval() -> None:
    asked = np.full(100, 5.0)
    good, same, bad = np.full(100, 4.0), np.tile([3.0, 5.0], 50), np.full(100, 2.0)
    tie = difference(good, same, asked)
    assert tie.verdict == "tie" and tie.low < 0 < tie.high and tie.value == 0.0
    assert difference(good, bad, asked).verdict == "ahead"
    assert difference(bad, good, asked).verdict == "behind"


def test_pictures_without_questions_count_for_nothing() -> None:
    hits, others, asked = np.array([3.0, 1.0, 2.0]), np.array([2.0, 1.0, 2.0]), np.array([4.0, 4.0, 4.0])
    more = [np.append(column, 0.0) for column in (hits, others, asked)]
    assert share(more[0], more[2]) == share(hits, asked) and difference(*more) == difference(hits, others, asked)
    one = share(np.array([3.0, 0.0]), np.array([4.0, 0.0]))
    assert (one.low, one.value, one.high) == (0.75, 0.75, 0.75)


def test_a_paired_difference_is_seen_where_the_intervals_overlap() -> None:
    def mark(picture: int, right: bool) -> Mark:
        return Mark(picture, 1, right, True, 1.0, 0.0, 10, ())

    scores = Scores()
    hard = np.random.default_rng(0).random(200) < 0.5
    scores.marks["vflowopt", 0.1] = [mark(place, not each) for place, each in enumerate(hard)]
    # Right wherever the other is, and on ten pictures more.
    scores.marks["rival", 0.1] = [
        mark(place, not each or int(hard[:place].sum()) < 10) for place, each in enumerate(hard)
    ]
    ours, rival = (row for row in scores.rows(200, "vflowopt") if row["turn"] == "all")
    assert rival["versus"] == "ahead" and rival["low"] < ours["high"]  # type: ignore[operator]
    assert rival["difference"] == pytest.approx(0.05) and 0 < rival["difference_low"] < 0.05  # type: ignore[operator]
    assert [line["method"] for line in summary([ours, rival])] == ["vflowopt @ 10%", "rival @ 10%"]


def test_a_chart_places_its_points(tmp_path: Path) -> None:
    lines = {"one": [(0.5, 0.9), (0.1, 0.5)], "a < b": [(0.1, 0.4)]}
    figure = line_chart(lines, title="t", across="x", up="y", levels={"whole": 0.95})
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}  # type: ignore[union-attr]
    assert drawn["one"] == [[0.1, 0.5], [0.5, 0.9]] and drawn["a < b"] == [[0.1, 0.4]]
    assert {y for _, y in drawn["whole"]} == {0.95}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10%", "50%"]
    for name in ("one.svg", "again.svg"):
        save(line_chart(lines, title="t", across="x", up="y"), tmp_path / "new" / name)
    texts = [(tmp_path / "new" / name).read_text() for name in ("one.svg", "again.svg")]
    assert "a &lt; b" in texts[0] and texts[0] == texts[1]
    with pytest.raises(ValueError, match="at least one point"):
        line_chart({}, title="t", across="x", up="y")


def test_answers_are_compared_without_case() -> None:
    assert Asked("q", "AB7").answered_by("ab7 ") and not Asked("q", "AB7").answered_by("ab")
