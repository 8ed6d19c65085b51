"""Sampling: greedy at zero, the nucleus kept, seeds repeat."""

import math

import pytest
import torch

from vflowopt.runtime.sampling import Sampler, SamplingError, SamplingOptions, sample


def draw(logits: torch.Tensor, *samplers: Sampler) -> list[int]:
    """A token by each sampler from the same logits."""
    return sample(logits.expand(len(samplers), -1), samplers)


def test_zero_temperature_takes_the_likeliest() -> None:
    assert draw(torch.tensor([0.1, 3.0, 2.9]), Sampler(SamplingOptions())) == [1]


def test_a_seed_repeats_whatever_others_draw() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    options = SamplingOptions(temperature=1.0, seed=7)
    alone = draw(logits, Sampler(options))[0]
    first, other = Sampler(options), Sampler(SamplingOptions(temperature=1.0, seed=8))
    greedy = Sampler(SamplingOptions())
    mixed = [draw(logits, greedy, other, first)[2] for _ in range(20)]
    again = Sampler(options)
    assert mixed == [draw(logits, again)[0] for _ in range(20)]
    assert mixed[0] == alone
    assert len(set(mixed)) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_a_batch_draws_what_its_rows_draw_alone(temperature: float) -> None:
    logits = torch.randn(16, 3000, generator=torch.Generator().manual_seed(1)) * 4
    options = [SamplingOptions(temperature, top_p=1 - row / 20, seed=row) for row in range(16)]
    together = sample(logits, [Sampler(each) for each in options])
    assert together == [sample(row[None], [Sampler(each)])[0] for row, each in zip(logits, options, strict=True)]


def test_greedy_rows_beside_drawn_ones_take_the_likeliest() -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(2))
    samplers = [Sampler(SamplingOptions(temperature=row % 2 * 1.5, seed=row)) for row in range(8)]
    assert sample(logits, samplers)[::2] == logits.argmax(-1)[::2].tolist()


def test_banned_tokens_are_not_drawn_and_the_logits_stay() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])
    before, banning = logits.clone(), Sampler()
    banning.banned = {1}
    assert sample(logits, [banning, Sampler()]) == [2, 1]
    assert torch.equal(logits, before)
    drawing = Sampler(SamplingOptions(temperature=2.0, seed=0))
    drawing.banned = {0, 1}
    assert {sample(logits[:1], [drawing])[0] for _ in range(50)} == {2}


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([0.1, 3.0, 2.9, -math.inf])
    assert draw(logits, Sampler(SamplingOptions(temperature=temperature, seed=1))) == [1]


def test_only_the_nucleus_is_drawn_from() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.75, seed=1))
    assert {draw(logits, sampler)[0] for _ in range(300)} == {0, 1}
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=1e-9, seed=1))
    assert {draw(logits, sampler)[0] for _ in range(20)} == {0}


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.1, 0.7, 0.2]))
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=3))
    counts = torch.bincount(torch.tensor([draw(logits, sampler)[0] for _ in range(3000)]), minlength=3) / 3000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.7, 0.2]), atol=0.04, rtol=0)


def test_greedy_choices_use_no_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(count: int) -> bytes:
        raise OSError("too many open files")

    monkeypatch.setattr("os.urandom", exhausted)
    assert draw(torch.tensor([0.0, 1.0]), Sampler()) == [1]


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
