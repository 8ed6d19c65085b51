"""AnyRes: an overview of the picture, and a mosaic of tiles of it at the best of several resolutions, unpadded.

Every picture is encoded as overview plus mosaic, however many pictures a conversation has. So its encoding does not
depend on other pictures, and it can be compressed when it arrives.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from vflowopt.compression.layout import TokenLayout, boxes_of
from vflowopt.media.picture import Detail
from vflowopt.models.tiled import TiledModel


class AnyResModel(TiledModel):
    """A model whose tokens are those of the overview, then those of the mosaic, whose rows end in a newline.

    In low detail there is no mosaic: the overview ends in one newline, as Hugging Face packs a picture of one tile.
    """

    def layout(self, height: int, width: int, detail: Detail) -> TokenLayout:
        """See :meth:`TiledModel.layout`. The overview is grid 0, the mosaic grid 1."""
        if detail == "low":
            return self._overview_layout(height, width)
        side = self.side // self.patch
        best = select_best_resolution((height, width), self.network.config.image_grid_pinpoints)
        tiles = 1 + (best[0] // self.side) * (best[1] // self.side)
        # A newline of NaN marks the structural tokens, wherever packing puts them.
        marks = self._pack_like_features(
            torch.zeros(tiles, side * side, 1), (height, width), torch.full((1,), torch.nan)
        ).flatten()
        structural = marks.isnan()
        overview = side * side
        mosaic = structural[overview:]
        # Of a very thin picture unpadding leaves no rows at all, or rows of nothing but their newline.
        columns = int(mosaic.nonzero()[0]) + 1 if len(mosaic) else 1
        place = torch.arange(len(mosaic))
        grid = torch.cat((torch.zeros(overview, dtype=torch.long), torch.ones(len(mosaic), dtype=torch.long)))
        row = torch.cat((torch.arange(overview) // side, place // columns))
        column = torch.cat((torch.arange(overview) % side, place % columns))

        # Pixels of a mosaic token: its share of the unpadded patch rows and columns, less the padding, unscaled.
        rows = len(mosaic) // columns
        inner = get_patch_output_size(np.broadcast_to(np.uint8(0), (1, height, width)), best, ChannelDimension.FIRST)
        scale = (inner[0] / height, inner[1] / width)
        overview_boxes = boxes_of(row[:overview], column[:overview], (height / side, width / side), (0.0, 0.0))
        steps, offsets = [], []
        for axis, count in enumerate((rows, columns - 1)):
            whole = best[axis] // self.patch
            cut = (whole - int(round(whole * min(1.0, _share(height, width, best)[axis]), 7))) // 2
            steps.append((whole - 2 * cut) / max(count, 1) * self.patch / scale[axis])
            offsets.append((cut * self.patch - (best[axis] - inner[axis]) // 2) / scale[axis])
        mosaic_boxes = boxes_of(row[overview:], column[overview:], (steps[0], steps[1]), (offsets[0], offsets[1]))
        boxes = torch.cat((overview_boxes, mosaic_boxes))
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = torch.minimum(boxes.clamp_min(0), limit).masked_fill(structural[:, None], 0.0)
        return TokenLayout(grid=grid, row=row, column=column, structural=structural, boxes=boxes)

    def _overview_layout(self, height: int, width: int) -> TokenLayout:
        side = self.side // self.patch
        place = torch.arange(side * side + 1)
        row, column = place // side, place % side
        row[-1], column[-1] = side - 1, side  # the newline stands behind the last row
        structural = place == side * side
        boxes = boxes_of(row, column, (height / side, width / side), (0.0, 0.0))
        return TokenLayout(
            grid=torch.zeros_like(place),
            row=row,
            column=column,
            structural=structural,
            boxes=boxes.masked_fill(structural[:, None], 0.0),
        )

    def _cut(self, pixels: np.ndarray, detail: Detail, **options: Any) -> np.ndarray:
        if detail == "low":
            options["image_grid_pinpoints"] = [[self.side, self.side]]  # the smallest mosaic, because it is thrown away
        tiles: np.ndarray = super()._cut(pixels, detail, **options)[0]  # of a batch of one picture
        return tiles[:1] if detail == "low" else tiles

    def _pack(self, projected: Tensor, size: Sequence[int]) -> Tensor:
        return self._pack_like_features(projected, size, self.network.model.image_newline)

    def _arrange(self, size: Sequence[int], values: Tensor) -> Tensor:
        return self._pack_like_features(values[..., None], size, values.new_zeros(1)).flatten()

    @abstractmethod
    def _pack_like_features(self, features: Tensor, size: Sequence[int], newline: Tensor) -> Tensor:
        """Hugging Face's packing of one picture: features [tiles, patches, channels] to [N, channels]."""


def _share(height: int, width: int, best: Sequence[int]) -> tuple[float, float]:
    """The share of the padded mosaic's height and width that the picture itself fills."""
    ratio = (width / height) / (best[1] / best[0])
    return (1 / ratio, 1.0) if ratio > 1 else (1.0, ratio)
