"""The five shared vectors, made by an independent statement of the method (sections 1 and 3)."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vflowopt.compression.importance import context_relevance, importance, patch_entropy
from vflowopt.compression.recycling import recycle

VECTORS = np.load(Path(__file__).parent / "vectors" / "importance_and_recycling.npz")
TOLERANCE = 1e-5


class Case:
    def __init__(self, number: int) -> None:
        self.number = number

    def __getitem__(self, name: str) -> npt.NDArray[np.generic]:
        return VECTORS[f"{self.number}/{name}"]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self[name])


@pytest.fixture(params=range(5))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_there_are_exactly_these_cases() -> None:
    assert {name.split("/")[0] for name in VECTORS.files} == {"0", "1", "2", "3", "4"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_context_relevance(case: Case, dtype: torch.dtype) -> None:
    attention = case.tensor("attention").to(dtype).mean(0)
    context = context_relevance(attention, float(case["threshold"]))
    np.testing.assert_allclose(context, case["context"], rtol=0, atol=TOLERANCE)


def test_patch_entropy(case: Case) -> None:
    entropy = patch_entropy(case.tensor("image"), int(case["patch"]))
    np.testing.assert_allclose(entropy, case["entropy"], rtol=0, atol=TOLERANCE)


def test_importance(case: Case) -> None:
    context = context_relevance(case.tensor("attention").mean(0), float(case["threshold"]))
    entropy = patch_entropy(case.tensor("image"), int(case["patch"])).flatten()
    scores = importance(context, entropy, float(case["alpha"]))
    np.testing.assert_allclose(scores, case["importance"], rtol=0, atol=TOLERANCE)


def test_recycling_with_the_published_reserve(case: Case) -> None:
    side = int(case["side"])
    index = torch.arange(side * side)
    outcome = recycle(
        case.tensor("features"),
        case.tensor("importance"),
        int(case["keep"]),
        grid=torch.zeros_like(index),
        row=index // side,
        column=index % side,
        structural=torch.zeros(side * side, dtype=torch.bool),
        side=float(case["grid"]),
        reserve="published",
    )
    np.testing.assert_array_equal(outcome.kept, case["kept"])
    np.testing.assert_allclose(outcome.features, case["recycled"], rtol=0, atol=TOLERANCE)
