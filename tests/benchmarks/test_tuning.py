"""The tuning benchmark at its smallest size, and what its figures mean."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import tuning
from benchmarks.information_flow import information_flow
from benchmarks.line_chart import line_chart
from benchmarks.published_tuning import published_cosine
from benchmarks.searches import Search
from demo_model.questions import held_out
from vflowopt.compression.strategy import Strategy
from vflowopt.demo import model_path
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import Calibration, Sample
from vflowopt.search.tuner import Trial


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    runtime = Runtime.load(model_path(), kv_budget=32 << 20)
    yield runtime
    runtime.pool.check_integrity([])


@pytest.fixture(scope="module")
def calibration(runtime: Runtime) -> Calibration:
    ((scene, about),) = held_out(9_100_000, 1, 1)
    sample = Sample(Picture.from_pixels(scene.image), tuple(question.text for question in about))
    calibration = Calibration(runtime, [sample], new_tokens=2, piece=2048)
    for _ in calibration.prepare():
        pass
    return calibration


def test_figures_at_the_smallest_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--samples", "1", "--questions", "2", "--seeds", "1", "--trials", "2", "--random-trials", "3"]
    files = ["--json", str(tmp_path / "figures.json"), "--plots", str(tmp_path / "plots")]
    assert tuning.main([*sizes, "--published-trials", "1", "--new-tokens", "2", *files]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    ours, everything, one = figures["cost"]
    assert ours["this_search_takes"] is None and 0 < one["seconds"] < everything["seconds"]
    assert everything["this_search_takes"] == pytest.approx(ours["seconds"] / everything["seconds"])
    assert [line["search"] for line in figures["quality"]] == [
        *("gp, 2 trials", "tpe, 2 trials", "random, 2 trials", "random, 3 trials", "none")
    ]
    base = figures["quality"][-1]["best_objective"]
    for sampler, climbs in figures["climbs"].items():
        (climb,) = climbs
        assert len(climb) == (3 if sampler == "random" else 2)
        assert climb == sorted(climb) and climb[0] == pytest.approx(base)
    best = Strategy.from_json(json.dumps(figures["best"]))
    assert best.budget(6) == pytest.approx(0.1)
    assert {name: len(line) for name, line in figures["flow"].items()} == {"after tuning": 6, "before tuning": 6}
    printed = capsys.readouterr().out
    assert "published, all questions" in printed and "random, 3 trials" in printed
    plots = {path.name: path.read_text() for path in (tmp_path / "plots").iterdir()}
    assert plots.keys() == {"objective.svg", "flow.svg"}
    assert all(f">{sampler}<" in plots["objective.svg"] for sampler in ("gp", "tpe", "random"))
    assert all(f">{when} tuning<" in plots["flow.svg"] for when in ("before", "after"))


def test_too_few_pictures_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_text('{"image": "a.png", "question": "What is it?"}')
    assert tuning.main(["--data", str(tmp_path), "--samples", "3"]) == 2
    assert "6 pictures are needed, half of them held out, but there are 1" in capsys.readouterr().err


def test_an_unknown_base_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuning.main(["--base", "mine"]) == 2
    assert "no strategy is called 'mine' to start from; there are preset-50, " in capsys.readouterr().err


def test_the_published_schedule_sees_the_same_cosine(runtime: Runtime, calibration: Calibration) -> None:
    strategy = Strategy.preset(0.1, runtime.layers)
    steps = calibration.cosines(strategy, [0])
    with pytest.raises(StopIteration) as end:
        while True:
            next(steps)
    (sample,) = calibration.samples
    cosine = published_cosine(runtime, sample, sample.questions[0], strategy)
    assert cosine == pytest.approx(float(end.value.value[0][0]), abs=1e-5) and cosine < 0.9999


def test_the_flow_of_the_unpruned_model_is_whole(runtime: Runtime, calibration: Calibration) -> None:
    pruned = Strategy.preset(0.1, runtime.layers)
    decoder = runtime.decoder
    flow = information_flow(runtime, calibration, {"full": Strategy.full(), "pruned": pruned})
    assert flow["full"] == pytest.approx([1.0] * runtime.layers, abs=1e-5)
    assert all(0.0 < cosine < 0.9999 for cosine in flow["pruned"])
    assert runtime.decoder is decoder


def test_the_best_of_a_search_has_seen_all_samples() -> None:
    seen = [
        Trial(number, Strategy.full(), objective, 4, stopped)
        for number, (objective, stopped) in enumerate([(0.5, False), (0.9, True), (0.4, False), (0.7, False)], 1)
    ]
    search = Search("random", 0, seen, 1.0)
    assert [search.best(trials).number for trials in (1, 2, 3, 4)] == [1, 1, 1, 4]
    assert search.climb == [0.5, 0.5, 0.5, 0.7]


def test_a_chart_of_many_values_names_some() -> None:
    (axes,) = line_chart({"one": [(x, 0.5) for x in range(1, 101)]}, title="t", across="x", up="y").axes
    assert 3 <= len(axes.get_xticks()) <= 16 and axes.get_lines()[0].get_marker() == ""
