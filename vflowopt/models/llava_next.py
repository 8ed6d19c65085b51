"""LLaVA-NeXT (LLaVA-1.6): CLIP tower, MLP projector, AnyRes tiles."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from vflowopt.models.anyres import AnyResModel


class LlavaNext(AnyResModel):
    """A model of the family ``llava_next``; see :class:`~vflowopt.models.tiled.TiledModel`."""

    family = "LLaVA-NeXT"
    architecture = LlavaNextForConditionalGeneration

    def _pack_like_features(self, features: Tensor, size: Sequence[int], newline: Tensor) -> Tensor:
        packed, _ = self.network.model.pack_image_features(
            [features], [tuple(size)], self.network.config.vision_feature_select_strategy, newline
        )
        result: Tensor = packed[0]
        return result
