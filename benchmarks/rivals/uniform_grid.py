"""A uniform grid of tokens: the control that spends the budget evenly over the picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.rivals.method import Compressed, Method, Sight, content_kept, keep_best, single_stage
from vflowopt.compression.layout import TokenLayout
from vflowopt.runtime.model_runner import Runtime


class UniformGrid(Method):
    """Keep the tokens at the points of a regular lattice over each token grid.

    Each grid (overview, mosaic) gets its share by size. Where no lattice has just as many points, the rest goes to
    tokens between them, evenly along the grid's rows.
    """

    name = "uniform"

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        encoded = sight.encoded
        return [
            keep_best(
                encoded,
                _evenly(encoded.layout, content_kept(encoded, retention, runtime.layers)).float(),
                single_stage(retention),
                runtime.layers,
            )
            for retention in retentions
        ]


def _evenly(layout: TokenLayout, count: int) -> Tensor:
    """Choose ``count`` content tokens, bool [N]."""
    chosen = torch.zeros(len(layout), dtype=torch.bool)
    content = int((~layout.structural).sum())
    before = given = 0
    for grid in range(int(layout.grid.max()) + 1):
        inside = ((layout.grid == grid) & ~layout.structural).nonzero().squeeze(-1)
        before += len(inside)
        due = count * before // content  # of all grids so far: what rounding takes from one, the next one gets
        rows, columns = layout.row[inside], layout.column[inside]
        chosen[inside[_lattice(rows, columns, due - given)]] = True
        given = due
    return chosen


def _lattice(row: Tensor, column: Tensor, count: int) -> Tensor:
    """Choose ``count`` of the tokens of one grid, which fill its rows and columns: int64 [count]."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    height, width = int(row.max()) + 1, int(column.max()) + 1
    down = min(height, max(1, round((count * height / width) ** 0.5)))
    across = min(width, count // down)
    down = min(height, count // across)
    points = (_middles(height, down)[:, None] * width + _middles(width, across)).flatten()
    between = torch.ones(height * width, dtype=torch.bool)
    between[points] = False
    free = between.nonzero().squeeze(-1)
    chosen = torch.cat((points, free[_middles(len(free), count - len(points))]))
    # Cells are numbered along the rows; so are the tokens of a grid, whatever their order.
    return (row * width + column).argsort()[chosen]


def _middles(length: int, parts: int) -> Tensor:
    """The middles of ``parts`` equal parts of ``range(length)``, int64 [parts]."""
    return (2 * torch.arange(parts) + 1) * length // (2 * max(parts, 1))
