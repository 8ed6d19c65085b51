"""Downsampling: a smaller picture, which has fewer tokens. The control that costs nothing to build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.rivals.method import Compressed, Method, Sight, single_stage, tokens_kept
from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.pipeline import CompressedImage, CompressionTimings, choose
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.anyres import AnyResModel
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.llava import Llava
from vflowopt.models.mistral3 import Mistral3
from vflowopt.models.qwen_vl import QwenVl
from vflowopt.models.tiled import TiledModel
from vflowopt.runtime.model_runner import Runtime

_DISTORTION = 1.2
"""How far the shape of the small picture may be from the picture's own: sides are whole numbers of patches."""


class Downsampling(Method):
    """Shrink the picture until its tokens are as many as the budget has, and encode what is left, whole.

    No token is dropped. Of the grids that fit the budget the largest is taken, so a few tokens of the budget may stay
    unused. Where a family sees pictures of any size (Qwen-VL, Mistral 3), the small picture is seen as any other. Where
    it sees tiles (LLaVA's families), the small picture is one grid of patches without tiles: the tower's position
    embeddings are interpolated to it, and the family's newline ends it, if it has one, as it ends any picture of a
    single tile. A model that was trained on tiles of one size has never seen such pictures, which is part of what
    downsampling costs without training.
    """

    name = "downsampling"

    def flaw(self, model: MultimodalModel) -> str | None:
        """See :meth:`Method.flaw`."""
        if isinstance(model, Llava | AnyResModel | QwenVl | Mistral3):
            return None
        return f"encodes no picture of {model.family}, which sees tiles of one size and shape alone"

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`.

        Raises:
            ValueError: the model is of a family that cannot see small pictures, or of one that enlarges one that would
                fit the budget.
        """
        if (flaw := self.flaw(runtime.model)) is not None:
            raise ValueError(f"{self.name} {flaw}")
        return [
            Compressed(
                self._shrink(runtime, sight.picture, tokens_kept(sight.encoded, retention, runtime.layers)),
                single_stage(retention),
            )
            for retention in retentions
        ]

    def _shrink(self, runtime: Runtime, picture: Picture, count: int) -> CompressedImage:
        """A picture in at most ``count`` tokens."""
        model = runtime.model
        if isinstance(model, TiledModel):
            return _as_one_grid(model, picture, count)
        assert isinstance(model, QwenVl | Mistral3)  # there are no others without a flaw
        rows, columns = grid_within(count, picture.height, picture.width, row_ends=int(isinstance(model, Mistral3)))
        side = model.patch * model.merge
        (encoded,) = model.encode([Picture.from_pixels(shrink(picture.pixels, rows * side, columns * side))])
        if len(encoded.layout) > count:
            raise ValueError(
                f"{self.name} finds no picture of {count} tokens: the image processor enlarges one of {rows} x "
                f"{columns} to {len(encoded.layout)}; keep more, or lower its least number of pixels"
            )
        image = choose(encoded, torch.zeros(len(encoded.layout)), Strategy.full(), runtime.layers)
        layout = model.layout((rows * model.merge, columns * model.merge), (picture.height, picture.width))
        return replace(image, digest=picture.digest, layout=layout)


def _as_one_grid(model: TiledModel, picture: Picture, count: int) -> CompressedImage:
    newline = isinstance(model, AnyResModel)
    rows, columns = grid_within(count - newline, picture.height, picture.width)
    embeddings = encode_whole(model, shrink(picture.pixels, rows * model.patch, columns * model.patch))
    if newline:
        embeddings = torch.cat((embeddings, model.network.model.image_newline[None]))
    layout = _layout(rows, columns, picture.height, picture.width, newline=newline)
    every = torch.arange(len(layout))
    return CompressedImage(
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


def grid_within(count: int, height: int, width: int, *, row_ends: int = 0) -> tuple[int, int]:
    """Rows and columns of the largest grid of at most ``count`` tokens that is shaped about like the picture.

    Where even the least grid of that shape has more, a single row or column is taken.

    Args:
        count: tokens at most.
        height: of the picture.
        width: of the picture.
        row_ends: tokens that end each row, beside those of the grid.
    """
    shape = height / width
    best = (1, max(1, count - row_ends)) if width > height else (max(1, count // (1 + row_ends)), 1)
    size = 0
    for rows in range(1, count // (1 + row_ends) + 1):
        columns = count // rows - row_ends
        distortion = rows / columns / shape
        if max(distortion, 1 / distortion) <= _DISTORTION and rows * columns > size:
            best, size = (rows, columns), rows * columns
    return best


def shrink(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a picture, uint8 [height, width, 3], with a filter that averages over all pixels that become one."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


@torch.inference_mode()
def encode_whole(model: TiledModel, pixels: np.ndarray) -> Tensor:
    """Projected tokens [patches, hidden] of a picture, uint8 [height, width, 3], whose sides are whole patches."""
    network = model.network
    batch = model.normalised(pixels.transpose(2, 0, 1)[None]).to(model.device, model.dtype)
    states = network.model.vision_tower(batch, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    features = torch.cat([states[index] for index in model.tower.features], dim=-1)
    projected: Tensor = network.model.multi_modal_projector(features[:, int(model.tower.class_token) :])[0]
    return projected


def _layout(rows: int, columns: int, height: int, width: int, *, newline: bool) -> TokenLayout:
    """One grid, and the newline behind it, if there is one."""
    place = torch.arange(rows * columns + newline)
    row, column = place // columns, place % columns
    if newline:
        row[-1], column[-1] = rows - 1, columns
    step = torch.tensor([width / columns, height / rows])
    corner = torch.stack((column, row), dim=-1) * step
    boxes = torch.cat((corner, corner + step), dim=-1).float()
    structural = place == rows * columns  # none, without newline
    return TokenLayout(
        grid=torch.zeros_like(place),
        row=row,
        column=column,
        structural=structural,
        boxes=boxes.masked_fill(structural[:, None], 0.0),
    )
