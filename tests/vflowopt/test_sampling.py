"""Sampling: greedy at zero, the nucleus kept, seeds repeat."""

import math

import pytest
import torch

from vflowopt.runtime.sampling import Sampler, SamplingError, SamplingOptions


def test_zero_temperature_takes_the_likeliest() -> None:
    assert Sampler(SamplingOptions())(torch.tensor([0.1, 3.0, 2.9])) == 1


def test_a_seed_repeats_whatever_others_draw() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    options = SamplingOptions(temperature=1.0, seed=7)
    alone = [Sampler(options)(logits)]
    first, other = Sampler(options), Sampler(SamplingOptions(temperature=1.0, seed=8))
    mixed = []
    for _ in range(20):
        mixed.append(first(logits))
        other(logits)
    again = Sampler(options)
    assert mixed == [again(logits) for _ in range(20)]
    assert mixed[0] == alone[0]
    assert len(set(mixed)) > 1


def test_only_the_nucleus_is_drawn_from() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.75, seed=1))
    drawn = {sampler(logits) for _ in range(300)}
    assert drawn == {0, 1}
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=1e-9, seed=1))
    assert {sampler(logits) for _ in range(20)} == {0}


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1]))
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=3))
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(3000)]), minlength=3) / 3000
    torch.testing.assert_close(counts, torch.tensor([0.7, 0.2, 0.1]), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("seed", -1),
    ],
)
def test_an_option_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(SamplingError) as refused:
        SamplingOptions(**{field: value})
    assert refused.value.field == field
