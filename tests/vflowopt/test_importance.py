import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vflowopt.compression import importance as importance_module
from vflowopt.compression.importance import (
    context_relevance,
    context_relevance_of,
    head_averaged_attention,
    importance,
    patch_entropy,
    received_attention,
)


def random_attention(tokens: int, seed: int, maps: int | None = None) -> torch.Tensor:
    shape = (tokens, tokens) if maps is None else (maps, tokens, tokens)
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)


def test_received_attention_averages_over_queries() -> None:
    attention = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert received_attention(attention).tolist() == [0.75, 0.25]


def test_only_the_focus_set_votes() -> None:
    # Token 0 receives 0.7 on average, the only one above 1.5 times the mean of 1/3: its row alone counts.
    attention = torch.tensor([[0.5, 0.4, 0.1], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1]])
    assert context_relevance(attention, 1.5).tolist() == pytest.approx([0.5, 0.4, 0.1])


def test_an_empty_focus_set_means_all_tokens() -> None:
    attention = random_attention(12, seed=0)
    context = context_relevance(attention, 1e6)
    assert torch.isfinite(context).all()
    torch.testing.assert_close(context, received_attention(attention))


@pytest.mark.parametrize("threshold", [0.0, 1.0, 1.5, 1e6])
def test_a_large_map_is_scored_in_blocks_like_a_small_one(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a class token, whose column is left out; 1e6: the focus set is empty."""
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn(3, 50, 8, generator=generator), torch.randn(3, 51, 8, generator=generator)
    expected = context_relevance(head_averaged_attention(query, key, 0.5)[:, 1:], threshold)
    held: list[int] = []

    def counting(*args: torch.Tensor) -> torch.Tensor:
        weights = head_averaged_attention(*args)
        held.append(weights.numel())
        return weights

    monkeypatch.setattr(importance_module, "head_averaged_attention", counting)
    for most in (51 * 50, 51 * 7):
        held.clear()
        monkeypatch.setattr(importance_module, "_MOST_WEIGHTS", most)
        torch.testing.assert_close(context_relevance_of(query, key, 0.5, threshold, 50), expected)
        assert max(held) <= most
    assert len(held) >= 8


@given(tokens=st.integers(1, 20), seed=st.integers(0, 2**31), threshold=st.floats(0, 50))
def test_context_relevance_shares_one_vote_per_focus_token(tokens: int, seed: int, threshold: float) -> None:
    context = context_relevance(random_attention(tokens, seed), threshold)
    assert (context >= 0).all()
    assert context.sum().item() == pytest.approx(1.0)


@given(seed=st.integers(0, 2**31), threshold=st.floats(0, 5))
def test_context_relevance_follows_a_permutation_of_the_tokens(seed: int, threshold: float) -> None:
    attention = random_attention(10, seed)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    shuffled = context_relevance(attention[order][:, order], threshold)
    torch.testing.assert_close(shuffled, context_relevance(attention, threshold)[order])


def test_each_map_has_its_own_focus_set() -> None:
    attention = random_attention(9, seed=1, maps=4)
    attention[2] = 1 / 9  # no token stands out in this one
    together = context_relevance(attention, 1.2)
    torch.testing.assert_close(together, torch.stack([context_relevance(each, 1.2) for each in attention]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_head_averaged_attention_equals_the_mean_over_heads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 5, 7, 8, generator=generator).to(dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    expected = (query.to(wide) @ key.to(wide).transpose(-1, -2) * 0.3).softmax(-1).mean(-3)
    averaged = head_averaged_attention(query, key, 0.3)
    assert averaged.dtype == wide
    torch.testing.assert_close(averaged, expected)
    torch.testing.assert_close(averaged[1], head_averaged_attention(query[1], key[1], 0.3))


def test_head_averaged_attention_refuses_shapes_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="heads"):
        head_averaged_attention(torch.zeros(2, 4, 8), torch.zeros(3, 4, 8), 1.0)
    with pytest.raises(ValueError, match="at least one head"):
        head_averaged_attention(torch.zeros(0, 4, 8), torch.zeros(0, 4, 8), 1.0)


def test_entropy_of_flat_and_of_evenly_spread_patches() -> None:
    flat = torch.full((16, 16, 3), 200, dtype=torch.uint8)
    spread = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).expand(16, 16, 3)
    assert patch_entropy(flat, 16).item() == 0.0
    assert patch_entropy(spread, 16).item() == pytest.approx(8.0)


def test_entropy_rounds_the_mean_of_the_channels() -> None:
    # Means 1/3, 2/3, 1 and 4/3 round to 0, 1, 1 and 1: 0.8113 bits. Cut off they would be 0, 0, 1 and 1: 1 bit.
    pixels = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[1, 1, 1], [2, 1, 1]]], dtype=torch.uint8)
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert patch_entropy(pixels, 2).item() == pytest.approx(expected)


def test_entropy_lies_where_its_patch_lies_and_ignores_what_is_left_over() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.full((2, 9, 14, 3), 90, dtype=torch.uint8)
    pixels[1, 4:8, 8:12] = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    pixels[:, 8:] = pixels[:, :, 12:] = 17
    entropy = patch_entropy(pixels, 4)
    assert entropy.shape == (2, 2, 3)
    assert entropy.nonzero().tolist() == [[1, 1, 2]]


def test_entropy_refuses_anything_but_bytes() -> None:
    with pytest.raises(ValueError, match="uint8"):
        patch_entropy(torch.rand(8, 8, 3), 4)
    with pytest.raises(ValueError, match="uint8"):
        patch_entropy(torch.zeros(3, 8, 8, dtype=torch.uint8), 4)
    for patch in (0, 9):
        with pytest.raises(ValueError, match="patch"):
            patch_entropy(torch.zeros(8, 8, 3, dtype=torch.uint8), patch)


@given(st.floats(-1, 1), st.integers(0, 2**31))
def test_importance_adds_the_weighted_softmax_of_the_entropy(alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    context = torch.rand(3, 11, generator=generator, dtype=torch.float64)
    entropy = 8 * torch.rand(3, 11, generator=generator, dtype=torch.float64)
    scores = importance(context, entropy, alpha)
    weights = entropy.exp() / entropy.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(scores, context + alpha * weights)


def test_a_negative_alpha_favours_flat_patches() -> None:
    scores = importance(torch.zeros(2), torch.tensor([0.0, 5.0]), -1.0)
    assert scores[0] > scores[1]
    assert scores[1] < 0
