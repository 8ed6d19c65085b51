"""Where a strategy comes from that a search has found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    """How a search found a strategy.

    Attributes:
        operation: resource name of the operation that ran the search.
        base: resource name of the strategy that it began with.
        data_digest: SHA-256 of the calibration samples, in hex.
        samples: how many there were.
        trials: strategies that were tried.
        seed: of the search.
        objective: mean cosine of the last hidden state with the unpruned model's.
        base_objective: that of the strategy that the search began with.
        model_revision: digest of the model.
        code_version: version of the service.
    """

    operation: str
    base: str
    data_digest: str
    samples: int
    trials: int
    seed: int
    objective: float
    base_objective: float
    model_revision: str
    code_version: str
