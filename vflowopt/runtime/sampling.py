"""Drawing the next token of every sequence of a batch: each by its own options, and reproducibly."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class SamplingError(ValueError):
    """An option out of range.

    Attributes:
        field: the option's name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn.

    Attributes:
        temperature: from 0 to 2. 0 takes the most likely token; a higher temperature gives more varied answers.
        top_p: above 0, at most 1. Tokens are drawn from the most likely ones that together have this probability.
        seed: from 0 to 2**63 - 1. Makes a draw repeatable; None: every draw differs.

    Raises:
        SamplingError: a value is out of range; ``field`` names it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 2.0):
            raise SamplingError("temperature", f"temperature is {self.temperature}; give a number from 0 to 2")
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise SamplingError("top_p", f"top_p is {self.top_p}; give a number above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise SamplingError("seed", f"seed is {self.seed}; give a whole number from 0 to 2**63 - 1")


class Sampler:
    """Draws the tokens of one answer, with random numbers of its own.

    Args:
        options: how tokens are drawn; None: always the most likely one.

    Attributes:
        options: as given, or the defaults.
        banned: tokens that must not be drawn next; may be changed between two draws.
    """

    def __init__(self, options: SamplingOptions | None = None) -> None:
        self.options = options or SamplingOptions()
        self.banned: Collection[int] = ()
        # Greedy draws need no random numbers, and so no entropy of the system either.
        self._random = None if self.options.temperature == 0.0 else random.Random(self.options.seed)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self._random is None

    def uniform(self) -> float:
        """The next random number, at least 0 and below 1; always 0 for a greedy sampler."""
        return 0.0 if self._random is None else self._random.random()


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw the next token of each sequence of a batch.

    A row depends on its own sampler alone, and not on other rows. The host waits for the device once.

    Args:
        logits: float32 [sequences, vocabulary].
        samplers: one for each row; each one that is not greedy uses one random number.

    Returns:
        A token id for each row.
    """
    banning = [row for row, sampler in enumerate(samplers) if sampler.banned]
    if banning:
        logits = logits.clone()
        for row in banning:
            logits[row, list(samplers[row].banned)] = -math.inf
    tokens = logits.argmax(-1)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawing:
        rows = _to_device(drawing, torch.int64, logits)
        tokens[rows] = _draw(logits[rows], [samplers[row] for row in drawing])
    chosen: list[int] = tokens.tolist()
    return chosen


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Draw a token at random for each row of logits [rows, vocabulary]; int64 [rows]."""
    knobs = [[sampler.options.temperature, sampler.options.top_p, sampler.uniform()] for sampler in samplers]
    temperature, top_p, uniform = _to_device(knobs, torch.float64, logits).t().unsqueeze(-1)
    # In float64, so that a seed draws the same on every device. The best token is shifted to 0: dividing by a tiny
    # temperature then sends all others to minus infinity, and never gives infinity minus infinity.
    shifted = logits.double() - logits.max(-1, keepdim=True).values
    ranked, order = torch.softmax(shifted / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    # A token stays while those before it have not reached top_p: the first one always does.
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
    reached = ranked.cumsum(-1)
    # The first token at which the sum passes the random number. Rounding may leave none: then the last one kept.
    place = (reached <= uniform * reached[:, -1:]).sum(-1, keepdim=True)
    last = (ranked > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(place, last))[:, 0]


def _to_device(values: Sequence[object], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor where ``like`` lives, without waiting for the device."""
    return torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda).to(like.device, non_blocking=True)
