"""The compiled order of maximal marginal relevance is the order without a compiler, token for token."""

import math
import shutil

import pytest
import torch
from torch import Tensor

from vflowopt.compression import diversity
from vflowopt.compression.diversity import diversified, diversifying
from vflowopt.kernels.diversity_kernel import diversity_kernel

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

GEOMETRIES = {
    "llava": (576, 4096),
    "llava-next": (1200, 512),
    "llava-onevision": (729, 896),
    "internvl": (1280, 300),
    "mistral3": (330, 1000),
    "qwen2-vl": (391, 1536),
    "qwen2.5-vl": (1036, 200),
    "qwen3-vl": (196, 2048),
    "demo": (1312, 192),
    "narrow": (50, 5),
    "one": (1, 16),
}
"""Tokens of a picture and channels of a token: of every family, and others that are no round numbers."""


def both_ways(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[Tensor, Tensor]:
    """What is computed with the kernel and without it."""
    compiled = diversified(*arguments)  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(diversity, "diversity_kernel", lambda: None)
        return compiled, diversified(*arguments)  # type: ignore[arg-type]


def smooth(tokens: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Importance, features and structural tokens of a picture: neighbours are alike, a few tokens matter."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, width, -(-tokens // 4) + 1, generator=generator)
    features = torch.nn.functional.interpolate(coarse, size=tokens, mode="linear")[0].T
    features = features + 0.2 * torch.randn(tokens, width, generator=generator)
    structural = torch.zeros(tokens, dtype=torch.bool)
    structural[9::10] = True
    return torch.rand(tokens, generator=generator) ** 4, features, structural


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize(("tokens", "width"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_order_is_the_same_at_every_geometry(
    tokens: int, width: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    importance, features, structural = smooth(tokens, width, seed=tokens)
    for dtype, weight in ((torch.float32, 0.7), (torch.bfloat16, 0.3)):
        compiled, plain = both_ways(
            monkeypatch, importance, features.to(dtype), structural, math.ceil(share * tokens), weight
        )
        assert torch.equal(compiled, plain)


@pytest.mark.parametrize("weight", [0.25, 0.7, 1.0])
@pytest.mark.parametrize("kinds", [1, 3, 40])
def test_of_equal_tokens_the_first_comes_first(kinds: int, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of few tokens, with few values of importance: nearly all scores are equal to others."""
    generator = torch.Generator().manual_seed(kinds)
    of_kind = torch.randint(kinds, (300,), generator=generator)
    features = torch.randn(kinds, 24, generator=generator)[of_kind]
    importance = torch.randint(3, (300,), generator=generator) / 4
    structural = torch.rand(300, generator=generator) < 0.1
    compiled, plain = both_ways(monkeypatch, importance, features, structural, 200, weight)
    assert torch.equal(compiled, plain)
    order = compiled.argsort(descending=True, stable=True)[: int((~structural).sum())].tolist()
    for kind in range(kinds):
        for value in importance.unique():
            alike = [token for token in order if of_kind[token] == kind and importance[token] == value]
            assert alike == sorted(alike)


def test_features_of_zero_are_like_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    importance, features, structural = smooth(80, 12, seed=3)
    features[::3] = 0
    compiled, plain = both_ways(monkeypatch, importance, features, structural, 40, 0.7)
    assert torch.equal(compiled, plain)


def test_it_works_in_pieces_of_bounded_size() -> None:
    importance, features, structural = smooth(400, 64, seed=5)
    kernel = diversity_kernel()
    assert kernel is not None
    rows = torch.nn.functional.normalize(features, dim=-1)
    pieces = kernel.order(rows, importance, 0, 200, 0.7, work=10_000)
    count = 0
    with pytest.raises(StopIteration) as ended:
        while True:
            next(pieces)
            count += 1
    assert count > 50
    with pytest.raises(StopIteration) as at_once:
        next(kernel.order(rows, importance, 0, 200, 0.7))
    assert ended.value.value == at_once.value.value
    # A picture that is huge is put in order in pieces, too.
    importance, features, structural = smooth(3000, 1024, seed=6)
    assert len(list(diversifying(importance, features, structural, 1500, 0.7))) > 1
