"""Choosing the next token from logits, per request and reproducibly."""

from __future__ import annotations

import math
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
        temperature: 0 takes the likeliest token; higher is more varied; at most 2.
        top_p: draw only from the likeliest tokens that together have this probability; above 0, at most 1.
        seed: makes a draw repeatable; None draws anew each time.

    Raises:
        SamplingError: a value out of range, with its name.
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
    """Draws the tokens of one request, from a generator of its own: what other requests do changes nothing."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token, from logits [vocabulary]."""
        if self.options.temperature == 0.0:
            return int(logits.argmax())
        # Sorted and summed in float64 on the CPU, so that a seed means the same wherever the model runs.
        probabilities = torch.softmax(logits.double().cpu() / self.options.temperature, dim=-1)
        ranked, tokens = probabilities.sort(descending=True, stable=True)
        # A token stays while those before it have not reached top_p: the first one always does.
        ranked = ranked.masked_fill(ranked.cumsum(0) - ranked >= self.options.top_p, 0.0)
        return int(tokens[torch.multinomial(ranked, 1, generator=self._generator)])
