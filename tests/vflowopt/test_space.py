"""Every point of the space is a strategy of exactly the budget."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vflowopt.compression.strategy import PUBLISHED, Strategy, StrategyError
from vflowopt.search.space import SearchSpace

coordinates = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0))


@st.composite
def spaces(draw: st.DrawFn) -> tuple[SearchSpace, Strategy, float, int]:
    layers = draw(st.integers(1, 40))
    starts = (0, *sorted(draw(st.sets(st.integers(1, layers), max_size=5)) - {layers}))
    base = Strategy(
        starts,
        (1.0,) * len(starts),
        grid=draw(st.sampled_from([None, 1.0, 4.0, 100.0])),
        positions=draw(st.sampled_from(["kept", "renumbered"])),
        reserve="published",
        diversity=draw(st.sampled_from([0.0, 0.7])),
    )
    budget = draw(st.one_of(st.floats(0.001, 1.0), st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0])))
    return SearchSpace(base, budget, layers), base, budget, layers


@given(spaces(), st.data())
def test_every_point_meets_the_budget_and_keeps_what_is_not_searched(
    space: tuple[SearchSpace, Strategy, float, int], data: st.DataObject
) -> None:
    within, base, budget, layers = space
    point = data.draw(st.tuples(*[coordinates] * within.dimensions))
    strategy = within.strategy(point)
    assert abs(strategy.budget(layers) - budget) < 1e-9
    searched = ["ratios", "threshold", "alpha", "grid", *(["diversity"] if base.diversity else [])]
    assert replace(strategy, **{name: getattr(base, name) for name in searched}) == base


@given(spaces(), st.data())
def test_a_strategy_of_the_space_is_nearest_to_itself(
    space: tuple[SearchSpace, Strategy, float, int], data: st.DataObject
) -> None:
    within, _, _, _ = space
    strategy = within.strategy(data.draw(st.tuples(*[st.floats(0.0, 1.0)] * within.dimensions)))
    again = within.strategy(within.nearest(strategy))
    assert again.ratios == pytest.approx(strategy.ratios, rel=1e-6)
    assert (again.threshold, again.alpha) == pytest.approx((strategy.threshold, strategy.alpha), abs=1e-6)
    assert again.diversity == strategy.diversity
    assert (again.grid is None) == (strategy.grid is None)
    assert again.grid is None or again.grid == pytest.approx(strategy.grid, rel=1e-6)


@given(spaces())
def test_the_base_is_fitted_to_any_budget(space: tuple[SearchSpace, Strategy, float, int]) -> None:
    within, base, budget, layers = space
    point, strategy = within.fitted_base()
    assert abs(strategy.budget(layers) - budget) < 1e-9
    assert (strategy == base) == (abs(base.budget(layers) - budget) < 1e-9)
    assert len(point) == within.dimensions and all(0.0 <= coordinate <= 1.0 for coordinate in point)


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
def test_the_published_strategies_are_inside(budget: float) -> None:
    preset = Strategy.preset(budget, 28)
    within = SearchSpace(preset, budget, 28)
    point, strategy = within.fitted_base()
    assert strategy is preset
    again = within.strategy(point)
    assert again.ratios == pytest.approx(preset.ratios, rel=1e-9)
    assert (again.threshold, again.alpha) == pytest.approx((preset.threshold, 0.0), abs=1e-9)
    assert again.grid == pytest.approx(preset.grid)


def test_another_budget_scales_what_each_stage_keeps() -> None:
    half = PUBLISHED[0.5]
    _, strategy = SearchSpace(half, 0.25, 28).fitted_base()
    scale = 0.25 / half.budget(28)
    assert strategy.retention == pytest.approx([kept * scale for kept in half.retention], rel=1e-6)
    assert (strategy.threshold, strategy.grid) == pytest.approx((half.threshold, half.grid))


def test_the_published_range_of_the_first_ratio_is_inside() -> None:
    within = SearchSpace(PUBLISHED[0.25], 0.25, 28)
    lowest, highest = (within.strategy((at, 0.0, 0.5, 0.5, 0.5)).ratios[0] for at in (0.0, 1.0))
    assert lowest == pytest.approx(0.25) and highest >= 0.375
    # The most that the second stage may then keep of it, the least, and everything.
    assert within.strategy((0.0, 1.0, 0.5, 0.5, 0.5)).ratios[1] == 1.0


def test_scales_run_from_end_to_end() -> None:
    within = SearchSpace(PUBLISHED[0.1], 0.1, 28)
    first, last = within.strategy((0.0,) * 5), within.strategy((1.0,) * 5)
    assert (first.threshold, first.alpha, first.grid) == (0.0, -1.0, 2.0)
    assert last.threshold == pytest.approx(50.0) and last.alpha == 1.0 and last.grid is None
    grids = [within.strategy((0.5, 0.5, 0.5, 0.5, at / 20)).grid or math.inf for at in range(21)]
    assert grids == sorted(grids) and grids[16] < 24.0 < grids[18]


def test_a_stage_more_is_a_dimension_more_and_so_is_diversity() -> None:
    one, two = Strategy((0,), (1.0,)), Strategy((0, 1), (1.0, 1.0))
    bases = (one, two, replace(two, diversity=0.5))
    assert [SearchSpace(base, 0.1, 8).dimensions for base in bases] == [3, 4, 5]


def test_diversity_is_searched_from_end_to_end_where_the_base_has_some() -> None:
    within = SearchSpace(Strategy((0,), (1.0,), diversity=0.7), 0.1, 8)
    assert [within.strategy((0.5, 0.5, 0.5, at)).diversity for at in (0.0, 0.7, 1.0)] == [0.0, 0.7, 1.0]
    assert within.fitted_base()[1].diversity == 0.7


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, math.nan])
def test_a_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(StrategyError) as refused:
        SearchSpace(PUBLISHED[0.1], budget, 28)
    assert refused.value.field == "budget"


def test_stages_beyond_the_decoder_are_refused() -> None:
    with pytest.raises(StrategyError) as refused:
        SearchSpace(PUBLISHED[0.1], 0.1, 12)
    assert refused.value.field == "starts"


@pytest.mark.parametrize("point", [(0.5,) * 4, (0.5,) * 6, (0.5, 0.5, 0.5, 0.5, 1.01), (math.nan,) * 5])
def test_what_is_no_point_is_refused(point: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected 5 coordinates from 0 to 1"):
        SearchSpace(PUBLISHED[0.1], 0.1, 28).strategy(point)
