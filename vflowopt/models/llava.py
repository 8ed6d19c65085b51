"""LLaVA-1.5 and models built like it: a tower that encodes the picture as one square, and an MLP projector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension

from vflowopt.compression.layout import TokenLayout, boxes_of
from vflowopt.media.picture import Detail
from vflowopt.models.tiled import TiledModel


class Llava(TiledModel):
    """A model of the family ``llava``; see :class:`~vflowopt.models.tiled.TiledModel`.

    No token covers what its image processor crops away (LLaVA-1.5's crops the ends of an oblong picture).
    """

    family = "LLaVA"
    architecture = LlavaForConditionalGeneration

    def layout(self, height: int, width: int, detail: Detail) -> TokenLayout:
        """See :meth:`TiledModel.layout`. One grid; tokens that cover nothing but padding have empty boxes."""
        padded, resized, seen = self._frames(height, width)
        scale = [after / before for after, before in zip(resized, padded, strict=True)]
        offset = [
            (after - crop) // 2 / by - (before - length) // 2
            for before, after, crop, by, length in zip(padded, resized, seen, scale, (height, width), strict=True)
        ]
        side = self.side // self.patch
        place = torch.arange(side * side)
        row, column = place // side, place % side
        boxes = boxes_of(row, column, (self.patch / scale[0], self.patch / scale[1]), (offset[0], offset[1]))
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        return TokenLayout(
            grid=torch.zeros_like(place),
            row=row,
            column=column,
            structural=torch.zeros_like(place, dtype=torch.bool),
            boxes=torch.minimum(boxes.clamp_min(0), limit),
        )

    def _frames(self, height: int, width: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Height and width of a picture once padded, then resized, then cropped, as its processor does."""
        processor = self.processor
        padded = [max(height, width)] * 2 if processor.do_pad else [height, width]
        resized: Sequence[int] = (processor.size.height, processor.size.width)
        if processor.size.shortest_edge:
            resized = get_resize_output_image_size(
                np.broadcast_to(np.uint8(0), (1, *padded)),
                processor.size.shortest_edge,
                default_to_square=False,
                input_data_format=ChannelDimension.FIRST,
            )
        crop = processor.crop_size
        return padded, resized, (crop.height, crop.width) if processor.do_center_crop else resized

    def _pack(self, projected: Tensor, size: Sequence[int]) -> Tensor:
        return projected[0]

    def _arrange(self, size: Sequence[int], values: Tensor) -> Tensor:
        return values[0]
