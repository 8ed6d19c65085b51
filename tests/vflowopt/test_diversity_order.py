"""The order of maximal marginal relevance, against one token after the other chosen among all."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vflowopt.compression.diversity import diversified


def chosen(importance: Tensor, features: Tensor, count: int, weight: float) -> list[int]:
    """The first ``count`` tokens, as the definition says."""
    relevance = (1 - weight) * (importance - importance.min()) / (importance.max() - importance.min())
    directions = F.normalize(features, dim=-1)
    likeness = directions @ directions.T
    order = [int(importance.argmax())]
    while len(order) < count:
        score = relevance - weight * likeness[:, order].amax(-1)
        score[order] = -torch.inf
        order.append(int(score.argmax()))
    return order


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weight", [0.3, 0.7])
def test_many_tokens_that_are_alike_hide_no_other(seed: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The most important ones, more than are looked at together, show the same thing.
    alike = torch.randn(1, 16, generator=generator) + 0.3 * torch.randn(150, 16, generator=generator)
    features = torch.cat((alike, torch.randn(150, 16, generator=generator)))
    importance = torch.cat((0.5 + torch.rand(150, generator=generator), torch.rand(150, generator=generator)))
    ranks = diversified(importance, features, torch.zeros(300, dtype=torch.bool), 80, weight)
    order = ranks.argsort(descending=True)[:80].tolist()
    assert order == chosen(importance, features, 80, weight)
