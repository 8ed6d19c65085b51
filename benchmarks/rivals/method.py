"""The interface of VFlowOpt and its rivals: from an encoded picture to a compressed one, at a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vflowopt.compression.pipeline import CompressedImage, EncodedImage, choose
from vflowopt.compression.pruning import stage_targets
from vflowopt.compression.strategy import Strategy
from vflowopt.media.video import Visual
from vflowopt.models.interface import MultimodalModel
from vflowopt.runtime.model_runner import Runtime


@dataclass(frozen=True, eq=False)
class Sight:
    """The input of a method.

    Attributes:
        picture: the upright picture, or the video.
        encoded: its N visual tokens, unpruned.
        question: the first question about it. Only question-aware methods read it.
    """

    picture: Visual
    encoded: EncodedImage
    question: str


@dataclass(frozen=True, eq=False)
class Compressed:
    """A picture compressed by a method.

    Attributes:
        image: the compressed picture.
        strategy: divides the decoder into the stages that ``image`` was pruned for.
    """

    image: CompressedImage
    strategy: Strategy

    def token_layers(self, layers: int) -> int:
        """Visual tokens, structural ones included, summed over the decoder's layers."""
        spans = self.strategy.spans(layers)
        return sum(len(kept) * span for kept, span in zip(self.image.kept, spans, strict=True))


class Method(ABC):
    """A way to compress a picture.

    All methods have the same budget: the retention is averaged over the decoder's layers, and structural tokens count.
    So at one retention all caches are equally large, up to rounding to whole tokens.

    Attributes:
        name: its name in tables.
        question_aware: whether the choice depends on :attr:`Sight.question`. Later questions then have to be answered
            from what the choice for the first one left in the cache.
    """

    name: str
    question_aware: ClassVar[bool] = False

    def flaw(self, model: MultimodalModel) -> str | None:
        """Why the method cannot be used with a model, in words that follow its name; None: it can."""
        return None

    @abstractmethod
    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """Compress a picture, once for each retention in (0, 1].

        Raises:
            StrategyError: a retention that the method cannot meet.
        """


class ScoringMethod(Method):
    """A method that ranks the tokens once, whatever the budget, and keeps the best of them in all layers."""

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        most = max(content_kept(sight.encoded, retention, runtime.layers) for retention in retentions)
        scores = self.scores(runtime, sight, most)
        return [keep_best(sight.encoded, scores, single_stage(each), runtime.layers) for each in retentions]

    @abstractmethod
    def scores(self, runtime: Runtime, sight: Sight, most: int) -> Tensor:
        """Rank the tokens: float [N], higher stays longer; values at structural tokens do not matter.

        Only the order of the ``most`` highest has to be right: no more content tokens than these are kept.
        """


def single_stage(retention: float) -> Strategy:
    """The strategy that keeps the same tokens in all layers."""
    return Strategy(starts=(0,), ratios=(retention,))


def keep_best(encoded: EncodedImage, scores: Tensor, strategy: Strategy, layers: int) -> Compressed:
    """Prune by scores [N] alone, as the strategy's stages say."""
    return Compressed(choose(encoded, scores, strategy, layers), strategy)


def tokens_kept(encoded: EncodedImage, retention: float, layers: int) -> int:
    """Tokens of a picture, structural ones included, that a single stage keeps."""
    layout = encoded.layout
    (kept,) = stage_targets(single_stage(retention), len(layout), int(layout.structural.sum()), layers)
    return kept


def content_kept(encoded: EncodedImage, retention: float, layers: int) -> int:
    """Tokens with pixels that a single stage keeps."""
    return tokens_kept(encoded, retention, layers) - int(encoded.layout.structural.sum())
