"""Objective against trials, in text."""

import contextlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from vflow_client.commands.objective_chart import best_until, objective_chart
from vflow_client.v1.strategies_pb2 import Trial

OBJECTIVES = st.floats(-1, 1)


def trials(*objectives: float, stopped: tuple[int, ...] = ()) -> list[Trial]:
    return [Trial(objective=objective, stopped_early=number in stopped) for number, objective in enumerate(objectives)]


def lines_of(chart: Text) -> list[str]:
    return chart.plain.splitlines()


def test_a_chart() -> None:
    chart = objective_chart(trials(0.5, 0.9, 0.6, 1.0, 0.8, stopped=(1,)), width=30, height=8)
    assert [line.rstrip() for line in lines_of(chart)] == [
        "1.0000┤                *⠤⠤⠤⠤⠤⠄",
        "      │      x         ⢸",
        "      │                ⢸     o",
        "      │                ⢸",
        "      │           *⠒⠒⠒⠒⠚",
        "0.5000┤*⠒⠒⠒⠒⠒⠒⠒⠒⠒⠒⠚",
        "      └┬─────────────────────┬",
        "       1                     5",
    ]
    styled = {chart.plain[span.start : span.end]: span.style for span in chart.spans}
    assert styled == {"*": "bold green", "x": "red"}


def test_one_trial_and_equal_trials(capfd: pytest.CaptureFixture[str]) -> None:
    assert lines_of(objective_chart(trials(0.5), width=16, height=4))[0].strip() == "0.5000┤    *"
    assert lines_of(objective_chart(trials(0.5, 0.5), width=16, height=4))[0].strip() == "0.5000┤*⠤⠤⠤⠤⠤⠤⠤o"
    assert capfd.readouterr() == ("", ""), "plotext warns on the standard output of values that are too close"


def test_an_outlier_does_not_compress_the_rest() -> None:
    chart = lines_of(objective_chart(trials(0.98, 0.1, 0.97, 0.99, 1.0), width=30, height=8))
    assert [line[:6] for line in (chart[0], chart[5])] == ["1.0000", "0.9250"]
    assert [line.strip() for line in chart if "v" in line] == ["0.9250┤      v"]


def test_a_chart_does_not_depend_on_the_one_before() -> None:
    first = objective_chart(trials(0.5, 0.7)).plain
    objective_chart(trials(*range(30)), width=20, height=6)
    assert objective_chart(trials(0.5, 0.7)).plain == first


def test_an_estimate_is_never_the_best() -> None:
    assert best_until(trials(0.2, 0.9, 0.1, 0.3, stopped=(1,))) == [0.2, 0.2, 0.2, 0.3]


def test_without_trials_there_is_no_chart() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        objective_chart([])


@given(objectives=st.lists(OBJECTIVES, min_size=1, max_size=200), width=st.integers(8, 100), height=st.integers(3, 20))
def test_any_chart_keeps_its_size(objectives: list[float], width: int, height: int) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        lines = lines_of(objective_chart(trials(*objectives), width=width, height=height))
    assert len(lines) == height and max(map(len, lines)) <= width
    if width >= 12:
        assert "*" in lines[0], "the best of all is on the top line"
    assert not printed.getvalue()
