"""A vision tower, run only as far as a model's features and the scoring of its tokens need it.

The layers are Hugging Face's. Their attention stays fused: scoring computes queries and keys by itself. On the
processor layers of a known kind run in fewer operations (:mod:`vflowopt.models.fused_tower`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vflowopt.models.fused_tower import FusedTowerLayer, PatchProduct


class Tower:
    """A SigLIP tower; towers built otherwise are subclasses.

    Args:
        module: Hugging Face's tower.
        feature_layer: index into the hidden states of which features are made, or several; the first hidden state is
            the input of the first layer, the last is what the last layer puts out, before any norm.
        scoring_layer: index of the layer whose attention scores tokens, negative from the end; None for the last one
            whose output feeds the projector (method section 1).

    Attributes:
        features: how many layers have run when each feature is taken.
        scoring: index of the scoring layer.
        class_token: whether a token that carries no pixels stands before the patches.
        patches: makes hidden states of 8-bit pixels; None: the tower takes normalised pixels.
    """

    class_token = False

    def __init__(self, module: Any, feature_layer: int | Sequence[int], scoring_layer: int | None) -> None:
        self.module = module
        depth = len(self.layers)
        chosen = [feature_layer] if isinstance(feature_layer, int) else feature_layer
        self.features = [index % (depth + 1) for index in chosen]
        self.scoring = max(self.features) - 1 if scoring_layer is None else scoring_layer % depth
        self.patches: PatchProduct | None = None
        self._fused: dict[int, FusedTowerLayer] = {}

    def fuse(self, rescale: float, mean: Sequence[float], deviation: Sequence[float]) -> None:
        """Run in fewer operations from now on, if the layers are of a known kind and lie on the processor.

        Args:
            rescale: factor of 8-bit pixels in normalisation.
            mean: of each colour, subtracted thereafter.
            deviation: of each colour, by which is divided thereafter.
        """
        used = range(max(*self.features, self.scoring + 1))
        if all(FusedTowerLayer.fits(self.layers[index]) for index in used):
            self._fused = {index: FusedTowerLayer(self.layers[index]) for index in used}
            self.patches = PatchProduct(self.module.embeddings.patch_embedding, rescale, mean, deviation)

    @property
    def layers(self) -> Sequence[Any]:
        """The tower's layers, in order."""
        layers: Sequence[Any] = self.module.encoder.layers
        return layers

    @property
    def scale(self) -> float:
        """Factor of the attention scores of the scoring layer."""
        scale: float = self._attention(self.layers[self.scoring]).scale
        return scale

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode tiles.

        Args:
            pixels: [tiles, 3, height, width], normalised; 8-bit ones if the tower has :attr:`patches`.

        Returns:
            Features [tiles, tokens, channels], the channels of several feature layers side by side, and queries and
            keys of the scoring layer, each [tiles, heads, tokens, head_dim]; all with the class token, if there is one.
        """
        hidden = self._embed(pixels)
        states: dict[int, Tensor] = {}
        query, key = None, None
        last = max(*self.features, self.scoring)
        for index in range(last + 1):
            # Only what is needed is kept: the states of all layers and tiles of a large tower are gigabytes.
            if index in self.features:
                states[index] = hidden
            if index == self.scoring:
                query, key = (
                    self._fused[index].queries_and_keys(hidden)
                    if self._fused
                    else self._queries_and_keys(self.layers[index], hidden)
                )
            if index < last:
                hidden = self._fused[index](hidden) if self._fused else self._run(self.layers[index], hidden)
        assert query is not None and key is not None
        return torch.cat([states[index] for index in self.features], dim=-1), query, key

    def _embed(self, pixels: Tensor) -> Tensor:
        """The input of the first layer."""
        if self.patches is not None:
            return self.patches(pixels).add_(self.module.embeddings.position_embedding.weight)
        embedded: Tensor = self.module.embeddings(pixels)
        return embedded

    def _run(self, layer: Any, hidden: Tensor) -> Tensor:
        output: Tensor = layer(hidden, None)
        return output

    def _attention(self, layer: Any) -> Any:
        return layer.self_attn

    def _queries_and_keys(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The queries and keys of a layer, from its input: each [tiles, heads, tokens, head_dim]."""
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        return (
            split_heads(attention.q_proj(normed), attention.num_heads),
            split_heads(attention.k_proj(normed), attention.num_heads),
        )


class ClipTower(Tower):
    """A CLIP tower: a norm before the first layer, a class token before the patches."""

    class_token = True

    def _embed(self, pixels: Tensor) -> Tensor:
        embeddings = self.module.embeddings
        if self.patches is None:
            embedded = embeddings(pixels)
        else:
            patches = self.patches(pixels)
            class_token = embeddings.class_embedding.expand(len(patches), 1, -1)
            embedded = torch.cat((class_token, patches), dim=1).add_(embeddings.position_embedding.weight)
        normed: Tensor = self.module.pre_layrnorm(embedded)
        return normed


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[tiles, tokens, channels] to [tiles, heads, tokens, head_dim]."""
    split: Tensor = states.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)
