import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vflowopt.compression.pruning import keep_most_important, stage_targets
from vflowopt.compression.strategy import Strategy, StrategyError, thirds

ratios = st.floats(0.01, 1.0)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Strategy, int, int, int]:
    layers = draw(st.integers(1, 40))
    stages = draw(st.integers(1, min(layers, 5)))
    strategy = Strategy(starts=thirds(layers, stages), ratios=tuple(draw(ratios) for _ in range(stages)))
    tokens = draw(st.integers(1, 3000))
    structural = draw(st.integers(0, min(tokens, 60)))
    return strategy, tokens, structural, layers


def cost(targets: tuple[int, ...], strategy: Strategy, layers: int) -> int:
    return sum(target * span for target, span in zip(targets, strategy.spans(layers), strict=True))


@given(plans())
def test_targets_never_exceed_the_budget(plan: tuple[Strategy, int, int, int]) -> None:
    strategy, tokens, structural, layers = plan
    targets = stage_targets(*plan)
    floor = min(structural + 1, tokens)
    assert len(targets) == len(strategy.ratios)
    assert all(floor <= target <= tokens for target in targets)
    assert list(targets) == sorted(targets, reverse=True)
    room = strategy.budget(layers) * tokens * layers * (1 + 1e-9)
    assert cost(targets, strategy, layers) <= room or set(targets) == {floor}


@given(plans())
def test_targets_use_the_budget_but_for_rounding(plan: tuple[Strategy, int, int, int]) -> None:
    strategy, tokens, _, layers = plan
    # Less than one token in each layer is left over: rounding each stage down loses no more.
    room = strategy.budget(layers) * tokens * layers
    assert room - cost(stage_targets(*plan), strategy, layers) < layers + 1e-6 * room


@pytest.mark.parametrize("tokens", [1, 7, 257, 1313])
def test_a_full_budget_keeps_everything(tokens: int) -> None:
    assert stage_targets(Strategy.full(), tokens, 1, 28) == (tokens,)
    assert stage_targets(Strategy(starts=(0, 9, 18), ratios=(1.0, 1.0, 1.0)), tokens, 1, 28) == (tokens,) * 3


def test_what_rounding_loses_is_given_back() -> None:
    # Of 10 tokens the stages' shares are 2.5 and 1.25, rounded down 2 and 1. With two layers each that spends 6 of 7.5,
    # and one more token in either stage would cost 2. With three layers and one it spends 7 of 8.75: the last gets one.
    strategy = Strategy(starts=(0, 2), ratios=(0.25, 0.5))
    assert stage_targets(strategy, 10, 0, 4) == (2, 1)
    strategy = Strategy(starts=(0, 3), ratios=(0.25, 0.5))
    assert stage_targets(strategy, 10, 0, 4) == (2, 2)


def test_exact_shares_survive_floating_point() -> None:
    # 0.1 * 3 is 0.30000000000000004 and 0.29 * 100 is 28.999999999999996: neither may cost a token.
    assert stage_targets(Strategy(starts=(0,), ratios=(0.29,)), 100, 0, 4) == (29,)
    for layers in range(3, 40):
        assert stage_targets(Strategy.from_budget(0.5, layers, (0.5, 1.0)), 256, 0, layers) == (128, 128, 128)


def test_earlier_stages_give_way_to_structural_tokens() -> None:
    strategy = Strategy(starts=(0, 5), ratios=(0.6, 0.1))
    # The last stage's share is 6 tokens, but 21 must stay: the first gives up 15 of its 60 for them.
    assert stage_targets(strategy, 100, 20, 10) == (45, 21)


def test_structural_tokens_and_one_more_stay_even_beyond_a_tiny_budget() -> None:
    assert stage_targets(Strategy.preset(0.1, 6), 300, 100, 6) == (101, 101, 101)
    assert stage_targets(Strategy.preset(0.1, 6), 3, 3, 6) == (3, 3, 3)


def test_targets_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="structural"):
        stage_targets(Strategy.full(), 4, 5, 6)
    with pytest.raises(StrategyError, match="starts"):
        stage_targets(Strategy.preset(0.1, 28), 100, 0, 12)


@st.composite
def scored_tokens(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    # Few distinct values, so that ties are common.
    scores = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=40))
    structural = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(structural)


@given(scored_tokens(), st.integers(0, 50))
def test_the_most_important_tokens_stay(tokens: tuple[torch.Tensor, torch.Tensor], count: int) -> None:
    scores, structural = tokens
    kept = keep_most_important(scores, structural, count).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == min(max(count, int(structural.sum())), len(scores))
    assert set(structural.nonzero().flatten().tolist()) <= set(kept)
    # In an order by importance, then place, no dropped token may come before a kept one.
    content = [index for index in range(len(scores)) if not structural[index]]
    ranked = sorted(content, key=lambda index: (-scores[index].item(), index))
    stays = [index in kept for index in ranked]
    assert stays == sorted(stays, reverse=True)


@given(scored_tokens(), st.lists(ratios, min_size=1, max_size=4))
def test_stages_are_nested(tokens: tuple[torch.Tensor, torch.Tensor], fractions: list[float]) -> None:
    scores, structural = tokens
    strategy = Strategy(starts=tuple(range(len(fractions))), ratios=tuple(fractions))
    targets = stage_targets(strategy, len(scores), int(structural.sum()), len(fractions))
    stages = [set(keep_most_important(scores, structural, target).tolist()) for target in targets]
    assert [len(stage) for stage in stages] == list(targets)
    for earlier, later in zip(stages, stages[1:], strict=False):
        assert later <= earlier


@given(st.permutations(range(12)), st.integers(0, 12))
def test_a_permutation_of_distinct_tokens_permutes_the_choice(order: list[int], count: int) -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    structural = torch.arange(12) % 5 == 0
    plain = set(keep_most_important(scores, structural, count).tolist())
    permuted = keep_most_important(scores[order], structural[order], count).tolist()
    assert {order[index] for index in permuted} == plain


def test_what_structural_tokens_score_does_not_matter() -> None:
    structural = torch.tensor([False, True, False])
    for value in (-1e9, 0.0, 1e9, float("nan")):
        assert keep_most_important(torch.tensor([1.0, value, 2.0]), structural, 2).tolist() == [1, 2]
