"""Where each visual token of a picture comes from: its grid, its cell, the pixels it covers.

It knows no models: an adapter (``vflowopt.models``) fills it in, and pruning and recycling read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The visual tokens of one picture, in the order in which the decoder reads them (N tokens).

    A picture may be cut into several token grids (the AnyRes overview is grid 0, its mosaic of tiles grid 1). Tokens
    that carry no pixels (row ends, separators) are structural: they are never pruned, averaged or scored.

    Attributes:
        grid: int64 [N], the grid a token belongs to.
        row: int64 [N], its row in that grid.
        column: int64 [N], its column in that grid; structural tokens stand one past the last column.
        structural: bool [N].
        boxes: float32 [N, 4], left, top, right and bottom of the pixels a token covers, in the upright picture; a
            structural token has an empty box.
    """

    grid: Tensor
    row: Tensor
    column: Tensor
    structural: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        """Number of tokens, structural ones included."""
        return self.grid.shape[0]

    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each grid, structural columns left out."""
        content = ~self.structural
        return [
            (int(self.row[inside].max()) + 1, int(self.column[inside].max()) + 1)
            for index in range(int(self.grid.max()) + 1)
            if (inside := (self.grid == index) & content).any()
        ]


def frames_layout(frames: int, shape: tuple[int, int], size: tuple[int, int]) -> TokenLayout:
    """The tokens of frames that are read row by row, each frame a grid; none is structural.

    Args:
        frames: how many; 1 for a picture.
        shape: rows and columns of tokens of a frame.
        size: height and width of a frame in pixels.
    """
    rows, columns = shape
    place = torch.arange(frames * rows * columns)
    row, column = place // columns % rows, place % columns
    return TokenLayout(
        grid=place // (rows * columns),
        row=row,
        column=column,
        structural=torch.zeros_like(place, dtype=torch.bool),
        boxes=boxes_of(row, column, (size[0] / rows, size[1] / columns), (0.0, 0.0)),
    )


def boxes_of(row: Tensor, column: Tensor, step: tuple[float, float], offset: tuple[float, float]) -> Tensor:
    """Boxes of grid cells: float32 [n, 4], left, top, right and bottom.

    Args:
        row: [n].
        column: [n].
        step: height and width of a cell in pixels.
        offset: y and x of the first cell's upper left corner.
    """
    top, left = row * step[0] + offset[0], column * step[1] + offset[1]
    return torch.stack((left, top, left + step[1], top + step[0]), dim=-1).float()
