"""Objective against trials, in text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vflow_client.commands.objective_chart import best_until, objective_chart
from vflow_client.v1.strategies_pb2 import Trial

OBJECTIVES = st.floats(-1, 1)


def trials(*objectives: float, stopped: tuple[int, ...] = ()) -> list[Trial]:
    return [Trial(objective=objective, stopped_early=number in stopped) for number, objective in enumerate(objectives)]


def test_a_chart() -> None:
    assert objective_chart(trials(0.5, 0.9, 0.6, 1.0, 0.8, stopped=(1,)), width=30, height=6).splitlines() == [
        "  1.0000 |              *-----",
        "         |    x",
        "         |                   o",
        "         |",
        "         |         *----",
        "  0.5000 |*--------",
        "         +--------------------",
        "          1                  5",
    ]


def test_one_trial_and_equal_trials() -> None:
    assert objective_chart(trials(0.5), width=14, height=2).splitlines()[0] == "  0.5000 |*---"
    assert objective_chart(trials(0.5, 0.5), width=14, height=2).splitlines()[0] == "  0.5000 |*--o"


def test_an_outlier_does_not_press_the_others_together() -> None:
    chart = objective_chart(trials(0.98, 0.1, 0.97, 0.99, 1.0), width=30, height=6).splitlines()
    assert [line[:8].strip() for line in (chart[0], chart[5])] == ["1.0000", "0.9250"]
    assert [line for line in chart if "v" in line] == ["  0.9250 |    v"]


def test_an_estimate_is_never_the_best() -> None:
    assert best_until(trials(0.2, 0.9, 0.1, 0.3, stopped=(1,))) == [0.2, 0.2, 0.2, 0.3]


def test_without_trials_there_is_no_chart() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        objective_chart([])


@given(objectives=st.lists(OBJECTIVES, min_size=1, max_size=200), width=st.integers(20, 100), height=st.integers(2, 20))
def test_any_chart_keeps_its_size(objectives: list[float], width: int, height: int) -> None:
    lines = objective_chart(trials(*objectives), width=width, height=height).splitlines()
    assert len(lines) == height + 2 and max(map(len, lines)) <= width
    assert "*" in lines[0], "the best of all is on the top line"
