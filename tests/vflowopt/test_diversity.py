"""The order by maximal marginal relevance, against a plain statement of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.vflowopt.generation import picture
from vflowopt.compression.diversity import diversified
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.pruning import stage_targets
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime


def plainly(importance: np.ndarray, features: np.ndarray, content: list[int], count: int, weight: float) -> list[int]:
    """The order of the content tokens, one token and one comparison at a time."""
    values = importance[content]
    scaled = {token: (importance[token] - values.min()) / (np.ptp(values) or 1.0) for token in content}
    left, order = list(content), []
    while left:
        marginal = {
            token: (1 - weight) * scaled[token]
            - weight * max(float(features[token] @ features[taken]) for taken in order)
            if order
            else scaled[token]
            for token in left
        }
        value = marginal if len(order) < count else scaled
        order.append(max(left, key=lambda token: (value[token], -token)))
        left.remove(order[-1])
    return order


@given(
    seed=st.integers(0, 10_000), tokens=st.integers(1, 20), share=st.floats(0, 1), weight=st.sampled_from([0.3, 0.7, 1])
)
def test_it_is_maximal_marginal_relevance(seed: int, tokens: int, share: float, weight: float) -> None:
    random = np.random.default_rng(seed)
    importance, features = random.random(tokens).astype(np.float32), random.normal(size=(tokens, 6))
    structural = random.random(tokens) < 0.3
    structural[random.integers(tokens)] = False
    content = [token for token in range(tokens) if not structural[token]]
    count = round(share * len(content))
    ranks = diversified(
        torch.from_numpy(importance), torch.from_numpy(features), torch.from_numpy(structural), count, weight
    )
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    order = ranks.argsort(descending=True, stable=True)[: len(content)].tolist()
    assert order == plainly(importance, features, content, count, weight)
    assert not ranks[torch.from_numpy(structural)].any()


def test_a_copy_of_a_token_comes_after_what_is_new() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    importance = torch.tensor([0.9, 0.8, 0.1])
    ranks = diversified(importance, features, torch.zeros(3, dtype=torch.bool), 3, 0.7)
    assert ranks.argsort(descending=True).tolist() == [0, 2, 1]


@pytest.mark.parametrize("grid", [None, 3.0])
@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_a_diverse_strategy_keeps_its_budget_and_its_stages_nest(
    runtime: Runtime, budget: float, grid: float | None
) -> None:
    shown = [Picture.from_pixels(picture(112, 200, 1))]
    strategy = Strategy.from_budget(budget, 6, (1.5 * budget, 0.9), threshold=2.0, grid=grid, diversity=0.7)
    diverse = runtime.compress(shown, strategy)[0]
    targets = stage_targets(strategy, diverse.tokens, int(diverse.layout.structural.sum()), 6)
    assert [len(kept) for kept in diverse.kept] == list(targets)
    for earlier, later in zip(diverse.kept, diverse.kept[1:], strict=False):
        assert torch.isin(later, earlier).all()

    def likeness(image: CompressedImage) -> float:
        """Mean similarity of what the first stage keeps, as far as it has pixels."""
        features = image.embeddings[~image.layout.structural[image.kept[0]]]
        features = torch.nn.functional.normalize(features, dim=-1)
        return float((features @ features.T).mean())

    by_importance = runtime.compress(
        shown, Strategy.from_budget(budget, 6, (1.5 * budget, 0.9), threshold=2.0, grid=grid)
    )[0]
    assert torch.equal(diverse.importance, by_importance.importance)
    if grid is None:  # averages of dropped tokens are alike whatever is kept
        assert likeness(diverse) < likeness(by_importance)
