"""Random pruning: the control that published methods often lose to."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rivals.method import ScoringMethod, Sight
from vflowopt.runtime.model_runner import Runtime


class RandomChoice(ScoringMethod):
    """Keep tokens at random.

    The draw follows from the picture's digest and the seed: it is the same in every run, whatever the order of the
    pictures.

    Args:
        seed: of the draws.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, runtime: Runtime, sight: Sight, most: int) -> Tensor:
        """See :meth:`ScoringMethod.scores`."""
        generator = torch.Generator().manual_seed(int(sight.encoded.digest[:12], 16) + self.seed)
        return torch.rand(len(sight.encoded.layout), generator=generator)
