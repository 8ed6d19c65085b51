"""InternVL: InternViT tower, pixel shuffle, MLP projector; tiles row by row, then a thumbnail of the whole picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vflowopt.compression.layout import TokenLayout, boxes_of, frames_layout
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.media.picture import Detail
from vflowopt.media.video import Video
from vflowopt.models.frame_text import with_text
from vflowopt.models.tiled_video import TiledVideoModel
from vflowopt.models.tower import Tower, split_heads


class InternVLTower(Tower):
    """An InternViT tower: a class token before the patches, norms of queries and keys in its larger models."""

    class_token = True

    @property
    def layers(self) -> Sequence[Any]:
        """See :attr:`Tower.layers`."""
        layers: Sequence[Any] = self.module.encoder.layer
        return layers

    def _run(self, layer: Any, hidden: Tensor) -> Tensor:
        output: Tensor = layer(hidden)
        return output

    def _attention(self, layer: Any) -> Any:
        return layer.attention

    def _queries_and_keys(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        attention, normed = layer.attention, layer.layernorm_before(hidden)
        return (
            split_heads(attention.q_norm(attention.q_proj(normed)), attention.num_heads),
            split_heads(attention.k_norm(attention.k_proj(normed)), attention.num_heads),
        )


class InternVL(TiledVideoModel):
    """A model of the family ``internvl``; see :class:`~vflowopt.models.tiled.TiledModel`.

    A picture's tokens begin and end with the tokens that mark it (``<img>`` and ``</img>``); they are structural. So
    are those of a video's frames, and the texts between them that count the frames.
    """

    family = "InternVL"
    architecture = InternVLForConditionalGeneration
    towers = {"internvl_vision": InternVLTower}

    def __init__(self, network: Any, tokenizer: Any, processor: Any) -> None:
        config = network.config
        if not isinstance(config.vision_feature_layer, int):
            raise self.unsupported(f"several feature layers {config.vision_feature_layer}")
        for what, sides in (("tiles", config.vision_config.image_size), ("patches", config.vision_config.patch_size)):
            if sides[0] != sides[1]:
                raise self.unsupported(f"oblong {what} of {sides[0]} x {sides[1]} pixels")
        self.merge = int(1 / config.downsample_ratio)
        super().__init__(network, tokenizer, processor)
        marks = [getattr(tokenizer, name, None) for name in ("start_image_token_id", "end_image_token_id")]
        if None in marks:
            raise self.unsupported("a tokenizer without start_image_token and end_image_token")
        self._marks = [mark for mark in marks if mark is not None]

    @property
    def side(self) -> int:
        """See :attr:`TiledModel.side`."""
        side: int = self.network.config.vision_config.image_size[0]
        return side

    @property
    def patch(self) -> int:
        """See :attr:`TiledModel.patch`."""
        patch: int = self.network.config.vision_config.patch_size[0]
        return patch

    def layout(self, height: int, width: int, detail: Detail) -> TokenLayout:
        """See :meth:`TiledModel.layout`. The thumbnail, or the only tile, is grid 0; a mosaic of tiles is grid 1."""
        columns, rows = (1, 1)
        if detail == "high":
            columns, rows = get_optimal_tiled_canvas(
                (height, width), (self.side, self.side), self.processor.min_patches, self.processor.max_patches
            )
        side = self.side // self.patch // self.merge
        whole, step = torch.arange(side * side), (height / side, width / side)
        grid, row, column = torch.zeros_like(whole), whole // side, whole % side
        boxes = boxes_of(row, column, step, (0.0, 0.0))
        if rows * columns > 1:
            tile = torch.arange(rows * columns).repeat_interleave(side * side)
            down = tile // columns * side + row.repeat(rows * columns)
            across = tile % columns * side + column.repeat(rows * columns)
            tiled = boxes_of(down, across, (step[0] / rows, step[1] / columns), (0.0, 0.0))
            grid = torch.cat((torch.ones_like(tile), grid))
            row, column, boxes = torch.cat((down, row)), torch.cat((across, column)), torch.cat((tiled, boxes))
        # The marks stand at the ends of the first row and of the last.
        ends = [[int(grid[0]), 0, side * (columns if rows * columns > 1 else 1)], [0, side - 1, side]]
        first, last = torch.tensor(ends).unbind()
        return TokenLayout(
            grid=torch.cat((first[:1], grid, last[:1])),
            row=torch.cat((first[1:2], row, last[1:2])),
            column=torch.cat((first[2:], column, last[2:])),
            structural=torch.tensor([True, *[False] * len(grid), True]),
            boxes=torch.cat((boxes.new_zeros(1, 4), boxes, boxes.new_zeros(1, 4))),
        )

    def _cut(self, pixels: np.ndarray, detail: Detail, **options: Any) -> np.ndarray:
        # Hugging Face's processor of the whole model asks its image processor for tiles, whatever its own setting.
        return super()._cut(pixels, detail, crop_to_patches=detail == "high", **options)

    def _project(self, features: Tensor) -> Tensor:
        if self.network.config.vision_feature_layer == -1:
            features = self.tower.module.layernorm(features)  # other hidden states are taken without it
        return super()._project(self._shuffled(features))

    def _pack(self, projected: Tensor, size: Sequence[int]) -> Tensor:
        marks = self.decoder.embed_tokens(torch.tensor(self._marks, device=projected.device))
        return torch.cat((marks[:1], projected.flatten(0, 1), marks[1:]))

    def _arrange(self, size: Sequence[int], values: Tensor) -> Tensor:
        return torch.nn.functional.pad(self._shuffled(values[..., None]).mean(-1).flatten(), (1, 1))

    def _video_mark(self) -> str | None:
        return getattr(self.tokenizer, "video_token", None)

    def _encoding_video(self, video: Video) -> Pieces[EncodedImage]:
        begin, end = self._marks
        texts: list[list[int]] = []
        for number in range(1, len(video.frames) + 1):
            counted = f"Frame{number}: " if number == 1 else f"\nFrame{number}: "
            ids = self.tokenizer(counted, add_special_tokens=False)["input_ids"]
            texts.append([*([end] if texts else []), *ids, begin])
        encoded = yield from super()._encoding_video(video)
        return with_text(encoded, [*texts, [end]], self.decoder.embed_tokens)

    def _pack_frames(self, projected: Tensor) -> Tensor:
        return projected.flatten(0, 1)

    def _arrange_frames(self, values: Tensor) -> Tensor:
        return self._shuffled(values[..., None]).mean(-1).flatten()

    def _layout_of_frames(self, video: Video) -> TokenLayout:
        side = self.side // self.patch // self.merge
        return frames_layout(len(video.frames), (side, side), (video.height, video.width))

    def _shuffled(self, patches: Tensor) -> Tensor:
        """Squares of patches side by side: [tiles, patches, channels] to [tiles, tokens, channels * merge ** 2]."""
        side = self.side // self.patch
        squares: Tensor = self.network.model.pixel_shuffle(
            patches.reshape(-1, side, side, patches.shape[-1]), scale_factor=self.network.config.downsample_ratio
        )
        return squares.flatten(1, 2)
