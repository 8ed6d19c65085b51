"""Recycling: averages, over a coarse grid, of the tokens dropped before the first layer (method section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vflowopt.compression.strategy import Reserve


@dataclass(frozen=True, eq=False)
class Recycled:
    """The tokens that enter the first layer.

    Attributes:
        kept: int64 [n], ascending indices into the N tokens; a recycled token counts under the index whose place it
            takes.
        recycled: int64 [m], ascending, those indices of ``kept`` that hold recycled tokens.
        features: [n, dim], the features of ``kept``.
    """

    kept: Tensor
    recycled: Tensor
    features: Tensor


def recycle(
    features: Tensor,
    importance: Tensor,
    count: int,
    grid: Tensor,
    row: Tensor,
    column: Tensor,
    structural: Tensor,
    *,
    side: float,
    reserve: Reserve = "occupied",
    ranks: Tensor | None = None,
) -> Recycled:
    """Keep the most important tokens, and one average of the dropped tokens per cell of a coarse grid.

    The dropped tokens of a cell are averaged, weighted by importance, and take the place of the most important of them.
    Weights are shifted by the least importance where that is negative (alpha below zero); where all of a cell's weights
    are zero, its plain mean is taken. Structural tokens are neither dropped nor averaged.

    Args:
        features: [N, dim].
        importance: [N]; its values at structural tokens do not matter.
        count: places, structural and recycled tokens included. All structural tokens stay even where it is smaller.
        grid: int64 [N], the token grid of each token; cells of different grids are apart.
        row: int64 [N], row of each token in its grid.
        column: int64 [N], column of each token in its grid.
        structural: bool [N].
        side: a, the side of a cell in tokens, at least 1, may be fractional.
        reserve: "occupied" keeps as many tokens unchanged as leave a place for every cell that still has dropped ones,
            and fills ``count`` exactly; where there are more cells than places, those of the greatest total importance
            are recycled. "published" drops int(content tokens / a^2) more tokens first, as the released code does, and
            recycles every cell: this may exceed ``count``.
        ranks: [N], where another order than that of importance says who stays: the greatest do. The averages are
            weighted by importance all the same.

    Returns:
        What stays, see `Recycled`.
    """
    content = (~structural).nonzero().squeeze(-1)
    places = max(count - (len(structural) - len(content)), 0)
    # From here on a token is identified by its rank among the content tokens: the first is the most important.
    ranked = content[(importance if ranks is None else ranks)[content].argsort(descending=True, stable=True)]
    if places >= len(ranked):
        return Recycled(torch.arange(len(structural), device=features.device), ranked[:0], features)

    cell, cells = _cells(grid[ranked], row[ranked], column[ranked], side)
    if reserve == "published":
        plain = max(places - int(len(ranked) / side**2), 0)
    else:
        plain = _plainly_kept(cell, cells, places)
    members = cell[plain:]
    weights = importance[ranked].double()
    weights = weights[plain:] - weights.min().clamp(max=0.0)
    means = _weighted_means(features[ranked[plain:]], weights, members, cells)

    # Ranks ascend, so a cell's first dropped token is its most important one.
    occupied, first = _first_of_each(members, cells)
    if reserve == "occupied" and len(occupied) > places - plain:
        total = torch.zeros(cells, dtype=weights.dtype, device=weights.device).index_add_(0, members, weights)
        richest = total[occupied].argsort(descending=True, stable=True)[: places - plain]
        occupied, first = occupied[richest], first[richest]

    outcome = features.clone()
    recycled = ranked[plain + first]
    outcome[recycled] = means[occupied]
    stays = structural.clone()
    stays[ranked[:plain]] = True
    stays[recycled] = True
    kept = stays.nonzero().squeeze(-1)
    return Recycled(kept, recycled.sort().values, outcome[kept])


def _cells(grid: Tensor, row: Tensor, column: Tensor, side: float) -> tuple[Tensor, int]:
    """Number the cells from 0, and say which of them each token lies in."""
    down, across = ((line.double() / side).long() for line in (row, column))
    # One number a cell: finding the distinct rows of a matrix takes longer than all the rest of recycling.
    width = across.max() + 1
    key = (grid * (down.max() + 1) + down) * width + across
    distinct, cell = torch.unique(key, return_inverse=True)
    return cell, len(distinct)


def _plainly_kept(cell: Tensor, cells: int, places: int) -> int:
    """Find the largest n such that n tokens and the cells that the others occupy take at most ``places``.

    A cell is occupied as long as its least important token is dropped. One more token kept empties at most one cell, so
    n + occupied(n) never falls as n grows, and a search over it is a count. ``cell`` is ordered by rank.
    """
    rank = torch.arange(len(cell), device=cell.device)
    last = torch.zeros(cells, dtype=rank.dtype, device=cell.device).scatter_reduce_(0, cell, rank, "amax")
    # emptied[n]: cells whose last token is among the n most important.
    emptied = torch.zeros(len(cell) + 1, dtype=rank.dtype, device=cell.device)
    emptied[last + 1] = 1
    taken = torch.arange(len(cell) + 1, device=cell.device) + cells - emptied.cumsum(0)
    return max(int((taken <= places).sum()) - 1, 0)


def _first_of_each(members: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """List the occupied cells, and where in ``members`` each of them comes first."""
    index = torch.arange(len(members), device=members.device)
    first = torch.full((cells,), len(members), dtype=index.dtype, device=members.device)
    first.scatter_reduce_(0, members, index, "amin")
    occupied = (first < len(members)).nonzero().squeeze(-1)
    return occupied, first[occupied]


def _weighted_means(features: Tensor, weights: Tensor, members: Tensor, cells: int) -> Tensor:
    """Average ``features`` [n, dim] within each cell, [cells, dim]; cells without members are left at zero."""
    total = torch.zeros(cells, dtype=weights.dtype, device=weights.device).index_add_(0, members, weights)
    weights = torch.where(total[members] > 0.0, weights, 1.0)
    total = torch.zeros_like(total).index_add_(0, members, weights)
    shares = (weights / total[members]).to(torch.promote_types(features.dtype, torch.float32))
    sums = torch.zeros(cells, features.shape[1], dtype=shares.dtype, device=features.device)
    return sums.index_add_(0, members, features * shares.unsqueeze(-1)).to(features.dtype)
