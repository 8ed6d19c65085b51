"""LLaVA-OneVision: SigLIP tower, MLP projector, AnyRes tiles whose mosaic shrinks to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from vflowopt.compression.layout import TokenLayout, frames_layout
from vflowopt.media.video import Video
from vflowopt.models.anyres import AnyResModel
from vflowopt.models.tiled_video import TiledVideoModel


class LlavaOnevision(TiledVideoModel, AnyResModel):
    """A model of the family ``llava_onevision``; see :class:`~vflowopt.models.tiled.TiledModel`.

    The tokens of a video's frames are pooled to half as many rows and columns; one newline ends them all.
    """

    family = "LLaVA-OneVision"
    architecture = LlavaOnevisionForConditionalGeneration

    def _pack_like_features(self, features: Tensor, size: Sequence[int], newline: Tensor) -> Tensor:
        packed, _ = self.network.model.pack_image_features(
            [features], [tuple(size)], newline, self.network.config.vision_aspect_ratio
        )
        result: Tensor = packed[0]
        return result

    def _video_mark(self) -> str | None:
        token: str | None = self.tokenizer.convert_ids_to_tokens(self.network.config.video_token_id)
        return None if token == self.image_token else token

    def _project_frames(self, features: Tensor) -> Tensor:
        pooled: Tensor = self.network.model.apply_pooling(self._project(features))
        return pooled

    def _pack_frames(self, projected: Tensor) -> Tensor:
        return torch.cat((projected.flatten(0, 1), self.network.model.image_newline[None].to(projected)))

    def _arrange_frames(self, values: Tensor) -> Tensor:
        return nn.functional.pad(self.network.model.apply_pooling(values[..., None]).flatten(), (0, 1))

    def _layout_of_frames(self, video: Video) -> TokenLayout:
        side = ceil(self.side // self.patch / 2)
        content = frames_layout(len(video.frames), (side, side), (video.height, video.width))
        return TokenLayout(
            grid=nn.functional.pad(content.grid, (0, 1), value=len(video.frames) - 1),
            row=nn.functional.pad(content.row, (0, 1), value=side - 1),
            column=nn.functional.pad(content.column, (0, 1), value=side),
            structural=nn.functional.pad(content.structural, (0, 1), value=True),
            boxes=nn.functional.pad(content.boxes, (0, 0, 0, 1)),
        )
