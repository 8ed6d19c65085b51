"""Downsampling: a smaller picture, which has fewer tokens. The control that costs nothing to build."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.rivals.method import Compressed, Method, Sight, single_stage, tokens_kept
from vflowopt.compression import CompressedImage, CompressionTimings
from vflowopt.layout import TokenLayout
from vflowopt.models.llava_onevision import LlavaOnevision
from vflowopt.runtime import Runtime

_DISTORTION = 1.2
"""How far the shape of the small picture may be from the picture's own: sides are whole numbers of patches."""


class Downsampling(Method):
    """Shrink the picture until its patches are as many as the budget has tokens, and encode what is left, whole.

    The small picture is one grid of patches without tiles; the vision tower's position embeddings are interpolated to
    it, and the family's newline ends it, as it ends any picture of a single tile. No token is dropped. Of the grids
    that fit the budget the largest is taken, so a few tokens of the budget may stay unused. A model that was trained
    on tiles of one size has never seen such pictures, which is part of what downsampling costs without training.

    Works for models of the LLaVA-OneVision family.
    """

    name = "downsampling"

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`.

        Raises:
            TypeError: the model is of another family.
        """
        model = runtime.model
        if not isinstance(model, LlavaOnevision):
            raise TypeError(f"downsampling encodes pictures for LlavaOnevision only, got {type(model).__name__}")
        return [
            self._shrink(model, sight, tokens_kept(sight.encoded, retention, runtime.layers), retention)
            for retention in retentions
        ]

    def _shrink(self, model: LlavaOnevision, sight: Sight, count: int, retention: float) -> Compressed:
        picture = sight.picture
        rows, columns = grid_within(count - 1, picture.height, picture.width)
        patch = model.network.config.vision_config.patch_size
        small = shrink(picture.pixels, rows * patch, columns * patch)
        embeddings = torch.cat((encode_whole(model, small), model.network.model.image_newline[None]))
        layout = _layout(rows, columns, picture.height, picture.width)
        every = torch.arange(len(layout))
        image = CompressedImage(
            digest=picture.digest,
            layout=layout,
            importance=torch.zeros(len(layout)),
            kept=(every,),
            recycled=every[:0],
            embeddings=embeddings,
            positions=every,
            span=len(layout),
            timings=CompressionTimings(0.0, 0.0, 0.0),
        )
        return Compressed(image, single_stage(retention))


def grid_within(count: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the largest grid of at most ``count`` patches that is shaped about like the picture.

    Where even the least grid of that shape has more patches, a single row or column is taken.
    """
    shape = height / width
    best = (1, max(1, count)) if width > height else (max(1, count), 1)
    size = 0
    for rows in range(1, count + 1):
        columns = count // rows
        distortion = rows / columns / shape
        if max(distortion, 1 / distortion) <= _DISTORTION and rows * columns > size:
            best, size = (rows, columns), rows * columns
    return best


def shrink(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a picture, uint8 [height, width, 3], with a filter that averages over all pixels that become one."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


@torch.inference_mode()
def encode_whole(model: LlavaOnevision, pixels: np.ndarray) -> Tensor:
    """Projected tokens [patches, hidden] of a picture, uint8 [height, width, 3], whose sides are whole patches."""
    processor, network = model.processor, model.network
    scaled = processor.rescale(pixels.transpose(2, 0, 1), scale=processor.rescale_factor)
    normed = processor.normalize(scaled, mean=processor.image_mean, std=processor.image_std)
    batch = torch.from_numpy(np.asarray(normed, np.float32))[None].to(model.device, model.dtype)
    states = network.model.vision_tower(batch, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    features = torch.cat([states[index] for index in model.tower.features], dim=-1)
    projected: Tensor = network.model.multi_modal_projector(features)[0]
    return projected


def _layout(rows: int, columns: int, height: int, width: int) -> TokenLayout:
    """One grid and the newline behind it."""
    place = torch.arange(rows * columns + 1)
    row, column = place // columns, place % columns
    row[-1], column[-1] = rows - 1, columns
    step = torch.tensor([width / columns, height / rows])
    corner = torch.stack((column, row), dim=-1) * step
    boxes = torch.cat((corner, corner + step), dim=-1).float()
    structural = place == rows * columns
    return TokenLayout(
        grid=torch.zeros_like(place),
        row=row,
        column=column,
        structural=structural,
        boxes=boxes.masked_fill(structural[:, None], 0.0),
    )
