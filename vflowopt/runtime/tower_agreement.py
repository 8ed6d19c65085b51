"""Whether a vision tower of a narrower number type agrees with the one that was loaded, on a few pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vflowopt.compression.pipeline import choose, score
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.generate import generate
from vflowopt.runtime.model_runner import Runtime

_RETENTION = 0.1
"""Budget of the choices that are compared: the smallest that strategies are shipped for."""

_ANSWER = 8
"""Tokens of the answers that are compared."""


@dataclass(frozen=True)
class TowerAgreement:
    """How far two towers agree; of several pictures, on the one that they agree least on.

    Attributes:
        rank_correlation: Spearman's, of the importance of tokens.
        overlap: share of the tokens that one keeps which the other keeps, too, at a tenth of them.
        answers: share of the pictures whose answers are the same text, with all tokens kept.
    """

    rank_correlation: float
    overlap: float
    answers: float

    @property
    def suffices(self) -> bool:
        """Whether one tower may stand in for the other."""
        return self.rank_correlation >= 0.99 and self.overlap >= 0.9 and self.answers == 1.0


def compare_towers(
    runtime: Runtime, dtype: torch.dtype, pictures: Sequence[Picture], question: str, *, most_seconds: float
) -> TowerAgreement | None:
    """Convert the tower of ``runtime`` to ``dtype`` if both agree well enough; it stays as it is otherwise.

    Args:
        runtime: its pool must hold a picture in low detail, with all its tokens.
        dtype: a narrower number type.
        pictures: what to compare the towers on, at least one; they are looked at in low detail.
        question: asked about each.
        most_seconds: how long the comparison may take.

    Returns:
        How far the two agree; None if the first picture shows that it would take longer.

    Raises:
        ModelError: this model has no tower that can be converted.
        PoolExhausted: the pool is too small.
    """
    model = runtime.model
    first, *others = (picture.in_detail("low") for picture in pictures)
    begun = time.perf_counter()
    exact = [_look(runtime, first, question)]
    if (time.perf_counter() - begun) * 2 * len(pictures) > most_seconds:
        return None
    exact += [_look(runtime, each, question) for each in others]
    wide_dtype, wide = model.tower_dtype, [(weight, weight.data) for weight in model.network.parameters()]
    model.set_tower_dtype(dtype)
    agreement = None
    try:
        agreement = _agreement(exact, [_look(runtime, each, question) for each in (first, *others)])
    finally:
        if agreement is None or not agreement.suffices:
            for weight, data in wide:
                weight.data = data  # converted back, they would have lost digits
            model.set_tower_dtype(wide_dtype)
    return agreement


@dataclass(frozen=True)
class _Look:
    """What comes of a picture."""

    importance: Tensor
    kept: frozenset[int]
    answer: str


@torch.inference_mode()
def _look(runtime: Runtime, picture: Picture, question: str) -> _Look:
    encoded = runtime.model.encode([picture])[0]
    few = Strategy.preset(_RETENTION, runtime.layers)
    importance = score(encoded, few)
    kept = choose(encoded, importance, few, runtime.layers).kept[0]
    content = ~encoded.layout.structural
    everything = Strategy.full()
    sequence = runtime.start(everything)
    try:
        turn = runtime.chat.turn(0, [choose(encoded, importance, everything, runtime.layers), question])
        answer = "".join(generate(runtime, sequence, turn, max_new_tokens=_ANSWER))
    finally:
        sequence.release()
    return _Look(importance[content], frozenset(kept[content[kept]].tolist()), answer)


def _agreement(some: Sequence[_Look], others: Sequence[_Look]) -> TowerAgreement:
    pairs = list(zip(some, others, strict=True))
    return TowerAgreement(
        rank_correlation=min(_rank_correlation(one.importance, other.importance) for one, other in pairs),
        overlap=min(len(one.kept & other.kept) / max(len(one.kept), 1) for one, other in pairs),
        answers=sum(one.answer == other.answer for one, other in pairs) / len(pairs),
    )


def _rank_correlation(some: Tensor, others: Tensor) -> float:
    """Spearman's: Pearson's of the ranks."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (some, others)])
    return float(torch.corrcoef(ranks)[0, 1])
