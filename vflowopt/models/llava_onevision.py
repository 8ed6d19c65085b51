"""LLaVA-OneVision: SigLIP tower, MLP projector, AnyRes tiles whose mosaic shrinks to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from vflowopt.models.anyres import AnyResModel


class LlavaOnevision(AnyResModel):
    """A model of the family ``llava_onevision``; see :class:`~vflowopt.models.tiled.TiledModel`."""

    family = "LLaVA-OneVision"
    architecture = LlavaOnevisionForConditionalGeneration

    def _pack_like_features(self, features: Tensor, size: Sequence[int], newline: Tensor) -> Tensor:
        packed, _ = self.network.model.pack_image_features(
            [features], [tuple(size)], newline, self.network.config.vision_aspect_ratio
        )
        result: Tensor = packed[0]
        return result
