import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vflowopt.compression.strategy import PUBLISHED, Strategy, StrategyError, thirds

ratios = st.floats(0.01, 1.0)


@st.composite
def any_strategy(draw: st.DrawFn) -> Strategy:
    starts = (0, *sorted(draw(st.sets(st.integers(1, 40), max_size=4))))
    return Strategy(
        starts=starts,
        ratios=tuple(draw(ratios) for _ in starts),
        threshold=draw(st.floats(0, 100)),
        alpha=draw(st.floats(-1, 1)),
        grid=draw(st.none() | st.floats(1, 40)),
        positions=draw(st.sampled_from(["kept", "renumbered"])),
        reserve=draw(st.sampled_from(["occupied", "published"])),
        diversity=draw(st.floats(0, 1)),
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"starts": ()}, "starts"),
        ({"starts": (1,)}, "starts"),
        ({"starts": (0, 5, 5), "ratios": (1.0, 1.0, 1.0)}, "starts"),
        ({"starts": (0, 5, 3), "ratios": (1.0, 1.0, 1.0)}, "starts"),
        ({"starts": (0, 1.5), "ratios": (1.0, 1.0)}, "starts"),
        ({"starts": (False,)}, "starts"),
        ({"starts": "0"}, "starts"),
        ({"ratios": (0.5, 0.5)}, "ratios"),
        ({"ratios": (0.0,)}, "ratios"),
        ({"ratios": (-0.1,)}, "ratios"),
        ({"ratios": (1.1,)}, "ratios"),
        ({"ratios": (math.nan,)}, "ratios"),
        ({"ratios": ("1",)}, "ratios"),
        ({"ratios": (True,)}, "ratios"),
        ({"ratios": 1.0}, "ratios"),
        ({"threshold": -1.0}, "threshold"),
        ({"threshold": math.inf}, "threshold"),
        ({"threshold": 10**400}, "threshold"),
        ({"threshold": None}, "threshold"),
        ({"alpha": 1.01}, "alpha"),
        ({"alpha": -1.01}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"grid": 0.99}, "grid"),
        ({"grid": math.inf}, "grid"),
        ({"grid": "4"}, "grid"),
        ({"positions": "dropped"}, "positions"),
        ({"positions": ["kept"]}, "positions"),
        ({"reserve": None}, "reserve"),
        ({"diversity": 1.01}, "diversity"),
        ({"diversity": -0.01}, "diversity"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(StrategyError) as caught:
        Strategy(**{"starts": (0,), "ratios": (1.0,), **fields})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_an_error_does_not_echo_what_was_sent_at_length() -> None:
    for value in ("x" * 10_000, [0] * 10_000, 10**9_000):
        with pytest.raises(StrategyError) as caught:
            Strategy(starts=(0,), ratios=(value,))
        assert len(str(caught.value)) < 200


def test_sequences_and_numbers_are_normalised() -> None:
    strategy = Strategy(starts=[0, 3], ratios=[1, 0.5], threshold=2, alpha=-0.0)
    assert strategy == Strategy(starts=(0, 3), ratios=(1.0, 0.5), threshold=2.0, alpha=0.0)
    assert hash(strategy) == hash(Strategy(starts=(0, 3), ratios=(1.0, 0.5), threshold=2.0))
    assert strategy.to_json() == Strategy(starts=(0, 3), ratios=(1.0, 0.5), threshold=2.0).to_json()


def test_full_keeps_everything() -> None:
    assert Strategy.full().budget(7) == 1.0
    assert Strategy.full().retention == (1.0,)


def test_budget_averages_the_retention_over_the_layers() -> None:
    strategy = Strategy(starts=(0, 2, 3), ratios=(0.8, 0.5, 0.5))
    assert strategy.spans(8) == (2, 1, 5)
    assert strategy.retention == pytest.approx((0.8, 0.4, 0.2))
    assert strategy.budget(8) == pytest.approx((2 * 0.8 + 1 * 0.4 + 5 * 0.2) / 8)


def test_stages_must_lie_within_the_model() -> None:
    strategy = Strategy(starts=(0, 9), ratios=(1.0, 0.5))
    strategy.check(10)
    with pytest.raises(StrategyError) as caught:
        strategy.check(9)
    assert caught.value.field == "starts"
    for layers in (0, -1, True, 2.0):
        with pytest.raises(StrategyError):
            Strategy.full().check(layers)


@pytest.mark.parametrize(("layers", "starts"), [(28, (0, 9, 18)), (32, (0, 10, 20)), (5, (0, 1, 2)), (3, (0, 1, 2))])
def test_thirds(layers: int, starts: tuple[int, ...]) -> None:
    assert thirds(layers) == starts


@pytest.mark.parametrize(("layers", "stages"), [(2, 3), (3, 0), (3, -1)])
def test_thirds_refuses_more_stages_than_layers(layers: int, stages: int) -> None:
    with pytest.raises(StrategyError):
        thirds(layers, stages)


@given(leading=st.lists(ratios, max_size=4), last=ratios, layers=st.integers(5, 60))
def test_from_budget_finds_the_ratio_that_was_left_out(leading: list[float], last: float, layers: int) -> None:
    whole = Strategy(starts=thirds(layers, len(leading) + 1), ratios=(*leading, last))
    budget = whole.budget(layers)
    assume(whole.retention[-1] > 1e-5)  # else the last stage drowns in the rounding of the stages before
    solved = Strategy.from_budget(budget, layers, leading)
    assert solved.starts == whole.starts
    assert solved.ratios == pytest.approx(whole.ratios, rel=1e-6)
    assert solved.budget(layers) == pytest.approx(budget, rel=1e-12)


def test_from_budget_passes_the_other_fields_on() -> None:
    strategy = Strategy.from_budget(
        0.4, 10, (0.5,), starts=(0, 2), threshold=3.0, alpha=-0.5, grid=4.5, positions="renumbered", reserve="published"
    )
    assert (strategy.starts, strategy.threshold, strategy.alpha, strategy.grid) == ((0, 2), 3.0, -0.5, 4.5)
    assert (strategy.positions, strategy.reserve) == ("renumbered", "published")
    assert strategy.budget(10) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("budget", "leading", "field", "word"),
    [
        (0.1, (0.5, 0.5), "budget", "too small"),
        (0.3, (0.9, 0.0001), "budget", "too small"),
        (0.9, (0.5, 0.5), "budget", "too large"),
        (0.0, (), "budget", "above 0"),
        (1.5, (), "budget", "at most 1"),
        (math.nan, (), "budget", "finite"),
        (0.5, (0.0,), "leading", "above 0"),
        (0.5, (1.5,), "leading", "at most 1"),
    ],
)
def test_a_budget_out_of_reach_is_named(budget: float, leading: tuple[float, ...], field: str, word: str) -> None:
    with pytest.raises(StrategyError, match=word) as caught:
        Strategy.from_budget(budget, 9, leading)
    assert caught.value.field == field


def test_a_whole_budget_is_reached_despite_rounding() -> None:
    assert Strategy.from_budget(1.0, 28, (1.0, 1.0)).ratios == (1.0, 1.0, 1.0)


def test_the_published_strategies_miss_their_nominal_budgets_slightly() -> None:
    budgets = {nominal: strategy.budget(28) for nominal, strategy in PUBLISHED.items()}
    assert budgets == pytest.approx({0.5: 0.5008, 0.25: 0.2507, 0.1: 0.100006}, abs=5e-5)
    assert budgets[0.1] == pytest.approx(0.100006, abs=5e-7)


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("layers", [*range(3, 34), 80])
def test_presets_meet_their_budget_at_any_depth(budget: float, layers: int) -> None:
    preset, published = Strategy.preset(budget, layers), PUBLISHED[budget]
    assert preset.budget(layers) == pytest.approx(budget, abs=1e-12)
    assert preset.starts == thirds(layers)
    assert preset.ratios[:-1] == published.ratios[:-1]
    assert (preset.threshold, preset.alpha, preset.grid) == (published.threshold, published.alpha, published.grid)
    assert preset.reserve == "occupied"


def test_there_are_no_other_presets() -> None:
    with pytest.raises(StrategyError) as caught:
        Strategy.preset(0.3, 28)
    assert caught.value.field == "budget"
    with pytest.raises(StrategyError) as caught:
        Strategy.preset(0.1, 2)
    assert caught.value.field == "layers"


@given(any_strategy())
def test_json_brings_the_same_strategy_back(strategy: Strategy) -> None:
    text = strategy.to_json()
    assert Strategy.from_json(text) == strategy
    assert Strategy.from_json(text.encode()).to_json() == text


def edited(**changes: object) -> str:
    document = {**json.loads(Strategy.preset(0.1, 28).to_json()), **changes}
    return json.dumps({name: value for name, value in document.items() if value is not ...})


def test_json_of_the_version_before_is_read() -> None:
    assert Strategy.from_json(edited(schema=1, diversity=...)) == Strategy.preset(0.1, 28)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "strategy"),
        ("{", "strategy"),
        ("[]", "strategy"),
        ("null", "strategy"),
        ("[" * 100_000, "strategy"),
        (b"\xff\xfe", "strategy"),
        (edited(schema=3), "schema"),
        (edited(schema=1), "diversity"),
        (edited(schema=...), "schema"),
        (edited(schema=True), "schema"),
        (edited(colour="red"), "colour"),
        (edited(starts=...), "starts"),
        (edited(grid=...), "grid"),
        (edited(starts="0, 9, 18"), "starts"),
        (edited(ratios=[1.0, 1.0, "1"]), "ratios"),
        (edited(threshold=math.nan), "strategy"),
        (edited(alpha=math.inf), "strategy"),
        (edited(threshold=0)[:-1] + ', "alpha": 0}', "alpha"),
        (edited().replace("39.265", "1e999"), "threshold"),
        (edited(positions=1), "positions"),
    ],
)
def test_json_is_read_strictly(text: str | bytes, field: str) -> None:
    with pytest.raises(StrategyError) as caught:
        Strategy.from_json(text)
    assert caught.value.field == field
