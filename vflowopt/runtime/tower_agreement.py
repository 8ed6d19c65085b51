"""Whether a vision tower of a narrower number type agrees with the one that was loaded, on a few pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.generate import generate
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import SamplingOptions

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
        answers: share of the pictures of whose answers every token is the same, with all tokens kept.
    """

    rank_correlation: float
    overlap: float
    answers: float

    @property
    def suffices(self) -> bool:
        """Whether one tower may stand in for the other."""
        return self.rank_correlation >= 0.99 and self.overlap >= 0.9 and self.answers == 1.0


def compare_towers(
    runtime: Runtime, dtype: torch.dtype, pictures: Sequence[Picture], question: str
) -> TowerAgreement:
    """Convert the tower of ``runtime`` to ``dtype`` if both agree well enough; it stays as it is otherwise.

    Args:
        runtime: its pool must hold a picture in low detail, with all its tokens.
        dtype: a narrower number type.
        pictures: what to compare the towers on; they are looked at in low detail.
        question: asked about each.

    Returns:
        How far the two agree.

    Raises:
        ModelError: this model has no tower that can be converted.
        PoolExhausted: the pool is too small.
    """
    model = runtime.model
    small = [picture.in_detail("low") for picture in pictures]
    wide_dtype, wide = model.tower_dtype, {id(weight): weight.data for weight in model.network.parameters()}
    exact = _seen(runtime, small, question)
    model.set_tower_dtype(dtype)
    try:
        agreement = _agreement(exact, _seen(runtime, small, question))
    except BaseException:
        agreement = TowerAgreement(0.0, 0.0, 0.0)
        raise
    finally:
        if not agreement.suffices:
            for weight in model.network.parameters():
                weight.data = wide[id(weight)]  # converted back, they would have lost digits
            model.set_tower_dtype(wide_dtype)
    return agreement


@dataclass(frozen=True)
class _Seen:
    importance: Tensor
    kept: frozenset[int]
    answer: str


def _seen(runtime: Runtime, pictures: Sequence[Picture], question: str) -> list[_Seen]:
    seen = []
    full = Strategy.full()
    few = runtime.compress(pictures, Strategy.preset(_RETENTION, runtime.layers))
    for image, whole in zip(few, runtime.compress(pictures, full), strict=True):
        sequence = runtime.start(full)
        try:
            turn = runtime.chat.turn(0, [whole, question])
            answer = "".join(generate(runtime, sequence, turn, max_new_tokens=_ANSWER, sampling=SamplingOptions()))
        finally:
            sequence.release()
        content = ~image.layout.structural
        seen.append(_Seen(image.importance[content], frozenset(image.kept[0][content[image.kept[0]]].tolist()), answer))
    return seen


def _agreement(some: Sequence[_Seen], others: Sequence[_Seen]) -> TowerAgreement:
    pairs = list(zip(some, others, strict=True))
    return TowerAgreement(
        rank_correlation=min(_rank_correlation(one.importance, other.importance) for one, other in pairs),
        overlap=min(len(one.kept & other.kept) / max(len(one.kept), 1) for one, other in pairs),
        answers=sum(one.answer == other.answer for one, other in pairs) / max(len(pairs), 1),
    )


def _rank_correlation(some: Tensor, others: Tensor) -> float:
    """Spearman's: Pearson's of the ranks."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (some, others)])
    return float(torch.corrcoef(ranks)[0, 1])
