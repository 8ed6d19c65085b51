"""From an encoded image to a compressed image: score, choose stage by stage, recycle.

It needs no question and nothing of the decoder, so a picture is compressed once, when it arrives (VFlowOpt, method
section 2). It knows no model family: its input is an :class:`EncodedImage`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vflowopt.compression.diversity import diversifying
from vflowopt.compression.importance import context_relevance_of, head_averaged_attention, importance, patch_entropy
from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.pieces import Pieces, timed, whole
from vflowopt.compression.pruning import keep_most_important, stage_targets
from vflowopt.compression.recycling import recycle
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Detail, Identity

_MOST_WEIGHTS = 1 << 26
"""Attention weights, over all heads, of the maps that are scored in one piece, unless a single map has more."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """The output of a model's vision encoder for a picture or a video; independent of any strategy.

    T maps (tiles or frames) of P patches each become N visual tokens of the decoder. In a video each is a token grid.

    Attributes:
        digest: SHA-256 of the picture's bytes, in hex.
        embeddings: [N, hidden], projected tokens in the order in which the decoder reads them; [N, hidden * (1 + D)]
            where each token has more features, to be added to the outputs of the first D decoder layers (deepstack).
        layout: where each token comes from.
        query: [T, heads, P, head_dim], of the scoring layer; [T, heads, 1, head_dim] where the class token alone says
            what matters.
        key: [T, heads, P, head_dim], of the scoring layer.
        scale: factor of that layer's attention scores.
        pixels: uint8 [T, height, width, 3], the 8-bit tiles that the encoder saw.
        patch: side of a patch in pixels.
        arrange: takes one value per patch [T, P] through everything the model does to its token grid, to one value
            per token [N]; the value at structural tokens is unspecified.
        class_key: [T, heads, 1, head_dim], of the encoder's class token, where it has one: it draws attention, but
            carries no pixels.
        merge: side, in patches, of the square that becomes one token, where the model merges patches; ``arrange``
            averages over it.
        positions: int64 [axes, N], where each token stands, counted from the picture's first position, for decoders
            whose positions have several axes (M-RoPE); None: one after another.
        later: D, the number of decoder layers to whose outputs further features of a token are added.
        detail: the detail in which the picture was encoded.
        frames: number of frames of a video; 0 for a picture.
        encode_ms: milliseconds that the encoder took, shared evenly by the pictures of its batch.
    """

    digest: str
    embeddings: Tensor
    layout: TokenLayout
    query: Tensor
    key: Tensor
    scale: float
    pixels: Tensor
    patch: int
    arrange: Callable[[Tensor], Tensor]
    class_key: Tensor | None = None
    merge: int = 1
    positions: Tensor | None = None
    later: int = 0
    detail: Detail = "high"
    frames: int = 0
    encode_ms: float = 0.0

    @property
    def entering(self) -> Tensor:
        """[N, hidden], the input of the first decoder layer."""
        return self.embeddings[:, : self.embeddings.shape[1] // (1 + self.later)]

    @property
    def places(self) -> Tensor:
        """int64 [N] or [axes, N], where each token stands, counted from the picture's first position."""
        return torch.arange(len(self.layout)) if self.positions is None else self.positions

    @property
    def span(self) -> int:
        """Positions that the picture takes in its conversation, unpruned."""
        return int(self.places.max()) + 1

    def attention(self) -> Iterator[Tensor]:
        """Attention of the scoring layer to the patches of each map, averaged over heads, computed one map at a time.

        Returns:
            T times float32 [P, P], or [1, P] where the class token alone says what matters. Rows are queries; they sum
            to 1 less what the class token receives.
        """
        for query, key in zip(self.query, self._all_keys(), strict=True):
            yield head_averaged_attention(query, key, self.scale)[:, -self.key.shape[-2] :]

    def context_relevance(self, threshold: float, first: int = 0, stop: int | None = None) -> Tensor:
        """How much the focus set of each map attends to each patch, float32 [T, P] (method section 1).

        Where the class token alone says what matters, its attention stands for that; there is no focus set.

        Args:
            threshold: sensitivity t, at least 0.
            first: the first map.
            stop: the map behind the last one; None: all maps from ``first`` on.
        """
        patches = self.key.shape[-2]
        return torch.stack(
            [
                context_relevance_of(query, key, self.scale, threshold, patches)
                for query, key in zip(self.query[first:stop], self._all_keys(first, stop), strict=True)
            ]
        )

    def _all_keys(self, first: int = 0, stop: int | None = None) -> Tensor:
        key = self.key[first:stop]
        return key if self.class_key is None else torch.cat((self.class_key[first:stop], key), dim=-2)


@dataclass(frozen=True)
class CompressionTimings:
    """Milliseconds that a picture's compression took: encoder, scoring, pruning with recycling."""

    encode_ms: float
    score_ms: float
    prune_ms: float


@dataclass(frozen=True, eq=False)
class CompressedImage:
    """A picture or a video as the decoder reads it: which of its N visual tokens each stage keeps.

    Attributes:
        digest: SHA-256 of the picture's bytes, in hex.
        layout: where each of the N tokens comes from.
        importance: float32 [N]; zero at structural tokens.
        kept: per stage, int64, ascending indices into the N tokens, each stage a subset of the one before. A recycled
            token counts under the index whose place it takes.
        recycled: int64, those indices of ``kept[0]`` that hold recycled tokens.
        embeddings: [len(kept[0]), hidden], or wider, like :attr:`EncodedImage.embeddings`.
        positions: int64 [len(kept[0])], or [axes, len(kept[0])], counted from the picture's first position.
        span: positions that the picture takes in its conversation.
        timings: how long the compression took.
        detail: the detail in which the picture was encoded.
        frames: number of frames of a video; 0 for a picture.
    """

    digest: str
    layout: TokenLayout
    importance: Tensor
    kept: tuple[Tensor, ...]
    recycled: Tensor
    embeddings: Tensor
    positions: Tensor
    span: int
    timings: CompressionTimings
    detail: Detail = "high"
    frames: int = 0

    @property
    def identity(self) -> Identity:
        """The key of the picture in caches."""
        return self.digest, self.detail

    @property
    def tokens(self) -> int:
        """Visual tokens before compression, structural ones included."""
        return len(self.layout)

    @property
    def last_stages(self) -> Tensor:
        """int64 [len(kept[0])]: the last stage in which each kept token is present."""
        return torch.stack([torch.isin(self.kept[0], kept) for kept in self.kept]).sum(0) - 1


def score(encoded: EncodedImage, strategy: Strategy) -> Tensor:
    """Importance of each visual token (method section 1), one map per tile or frame.

    Returns:
        float32 [N]; zero at structural tokens.
    """
    return whole(_scoring(encoded, strategy))


def _scoring(encoded: EncodedImage, strategy: Strategy) -> Pieces[Tensor]:
    """:func:`score` in pieces, some maps in each."""
    _, heads, queries, _ = encoded.query.shape
    together = max(_MOST_WEIGHTS // (heads * queries * encoded.key.shape[-2]), 1)
    scored = []
    for first in range(0, len(encoded.query), together):
        maps = encoded.context_relevance(strategy.threshold, first, first + together)
        # With a weight of 0 the entropy need not be computed: the published strategies all have alpha 0.
        if strategy.alpha:
            pixels = encoded.pixels[first : first + together]
            entropy = _averaged_in_squares(patch_entropy(pixels, encoded.patch), encoded.merge)
            maps = importance(maps, entropy.flatten(1).to(maps.device), strategy.alpha)
        scored.append(maps.float())
        yield
    arranged = encoded.arrange(torch.cat(scored))
    return arranged.masked_fill(encoded.layout.structural.to(arranged.device), 0.0).cpu()


def _averaged_in_squares(values: Tensor, side: int) -> Tensor:
    """Values [T, rows, columns], each replaced by the mean of its square: a softmax counts a merged square once."""
    means = nn.functional.avg_pool2d(values, side)
    return means.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)


def choose(encoded: EncodedImage, scores: Tensor, strategy: Strategy, layers: int) -> CompressedImage:
    """Prune by the given scores, stage by stage, and recycle (method sections 2 and 3).

    Args:
        encoded: the picture's tokens.
        scores: float32 [N], higher stays longer; usually :func:`score`'s, a rival's in comparisons.
        strategy: how much each stage keeps; its stages must lie within the decoder.
        layers: decoder layers of the model, over which the budget is averaged.
    """
    image, prune_ms = whole(timed(choosing(encoded, scores, strategy, layers), _since))
    return replace(image, timings=replace(image.timings, prune_ms=prune_ms))


def choosing(encoded: EncodedImage, scores: Tensor, strategy: Strategy, layers: int) -> Pieces[CompressedImage]:
    """:func:`choose` in pieces, without the time that they take."""
    layout = encoded.layout
    structural = int(layout.structural.sum())
    targets = stage_targets(strategy, len(layout), structural, layers)
    ranks, choices = scores, [target - structural for target in targets if target < len(layout)]
    if strategy.diversity and choices:
        ranks = yield from diversifying(scores, encoded.entering, layout.structural, choices[0], strategy.diversity)
    if strategy.grid is None or targets[0] == len(layout):
        first = keep_most_important(ranks, layout.structural, targets[0])
        recycled = first[:0]
        embeddings = encoded.embeddings[first.to(encoded.embeddings.device)]
    else:
        outcome = recycle(
            encoded.embeddings.float().cpu(),
            scores,
            targets[0],
            layout.grid,
            layout.row,
            layout.column,
            layout.structural,
            side=strategy.grid,
            reserve=strategy.reserve,
            ranks=ranks,
        )
        first, recycled = outcome.kept, outcome.recycled
        embeddings = outcome.features.to(encoded.embeddings)
    kept = [first]
    for target in targets[1:]:
        previous = kept[-1]
        kept.append(previous[keep_most_important(ranks[previous], layout.structural[previous], target)])
    positions, span = encoded.places[..., first], encoded.span
    if strategy.positions == "renumbered":
        positions, span = torch.arange(len(first)).expand_as(positions), len(first)
    return CompressedImage(
        digest=encoded.digest,
        layout=layout,
        importance=scores,
        kept=tuple(kept),
        recycled=recycled,
        embeddings=embeddings,
        positions=positions,
        span=span,
        timings=CompressionTimings(encoded.encode_ms, 0.0, 0.0),
        detail=encoded.detail,
        frames=encoded.frames,
    )


def compress(encoded: EncodedImage, strategy: Strategy, layers: int) -> CompressedImage:
    """Score, prune and recycle an encoded picture (method sections 1 to 3); arguments as in :func:`choose`."""
    return whole(compressing(encoded, strategy, layers))


def compressing(encoded: EncodedImage, strategy: Strategy, layers: int) -> Pieces[CompressedImage]:
    """:func:`compress` in pieces."""
    scores, score_ms = yield from timed(_scoring(encoded, strategy), _since)
    image, prune_ms = yield from timed(choosing(encoded, scores, strategy, layers), _since)
    return replace(image, timings=CompressionTimings(encoded.encode_ms, score_ms, prune_ms))


def _since(begun: float) -> float:
    """Milliseconds since a ``time.perf_counter()``."""
    return (time.perf_counter() - begun) * 1e3
