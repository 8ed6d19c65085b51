import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vflowopt.compression.recycling import Recycled, recycle
from vflowopt.compression.strategy import Reserve


@dataclass
class Tokens:
    """The tokens of one or two grids, each of whose rows ends in a structural token."""

    features: torch.Tensor
    importance: torch.Tensor
    grid: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    structural: torch.Tensor

    @classmethod
    def random(cls, shapes: list[tuple[int, int]], seed: int, least: float = 0.0) -> "Tokens":
        places = [
            (grid, row, column, column == columns)
            for grid, (rows, columns) in enumerate(shapes)
            for row in range(rows)
            for column in range(columns + 1)
        ]
        grid, row, column, structural = (torch.tensor(values) for values in zip(*places, strict=True))
        generator = torch.Generator().manual_seed(seed)
        # Coarse values, so that ties are common.
        scores = (torch.rand(len(places), generator=generator, dtype=torch.float64) * 20).round() / 20
        features = torch.randn(len(places), 5, generator=generator, dtype=torch.float64)
        return cls(features, least + (1 - least) * scores, grid, row, column, structural)

    def recycle(self, count: int, side: float, reserve: Reserve = "occupied") -> Recycled:
        return recycle(
            self.features,
            self.importance,
            count,
            self.grid,
            self.row,
            self.column,
            self.structural,
            side=side,
            reserve=reserve,
        )

    def cells(self, indices: set[int], side: float) -> dict[tuple[int, int, int], list[int]]:
        cells: dict[tuple[int, int, int], list[int]] = {}
        for index in sorted(indices):
            place = (
                int(self.grid[index]),
                math.floor(int(self.row[index]) / side),
                math.floor(int(self.column[index]) / side),
            )
            cells.setdefault(place, []).append(index)
        return cells


@st.composite
def recyclings(draw: st.DrawFn) -> tuple[Tokens, int, float]:
    shapes = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=2))
    tokens = Tokens.random(shapes, draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, -1.0])))
    return tokens, draw(st.integers(1, len(tokens.structural) + 2)), draw(st.floats(1.0, 9.0))


def plainly_kept(tokens: Tokens, outcome: Recycled) -> set[int]:
    return set(outcome.kept.tolist()) - set(outcome.recycled.tolist())


reserves = st.sampled_from(["occupied", "published"])


@given(recyclings(), reserves)
def test_indices_are_ascending_and_structural_tokens_stay(
    recycling: tuple[Tokens, int, float], reserve: Reserve
) -> None:
    tokens, count, side = recycling
    outcome = tokens.recycle(count, side, reserve)
    kept, recycled = outcome.kept.tolist(), outcome.recycled.tolist()
    assert kept == sorted(set(kept))
    assert recycled == sorted(set(recycled))
    assert set(recycled) <= set(kept)
    assert not tokens.structural[outcome.recycled].any()
    assert set(tokens.structural.nonzero().flatten().tolist()) <= set(kept)
    assert outcome.features.shape == (len(kept), 5)


@given(recyclings())
def test_occupied_cells_fill_the_count_exactly(recycling: tuple[Tokens, int, float]) -> None:
    tokens, count, side = recycling
    structural = int(tokens.structural.sum())
    assert len(tokens.recycle(count, side).kept) == min(max(count, structural), len(tokens.structural))


@given(recyclings())
def test_as_many_tokens_stay_unchanged_as_the_cells_leave_room_for(recycling: tuple[Tokens, int, float]) -> None:
    tokens, count, side = recycling
    outcome = tokens.recycle(count, side)
    content = (~tokens.structural).nonzero().flatten().tolist()
    ranked = sorted(content, key=lambda index: (-tokens.importance[index].item(), index))
    places = count - int(tokens.structural.sum())
    needed = [plain + len(tokens.cells(set(ranked[plain:]), side)) for plain in range(len(ranked) + 1)]
    expected = max((plain for plain, taken in enumerate(needed) if taken <= places), default=0)
    plain = plainly_kept(tokens, outcome) - set(tokens.structural.nonzero().flatten().tolist())
    assert plain == set(ranked[:expected])


@given(recyclings(), reserves)
def test_recycled_tokens_average_the_dropped_tokens_of_their_cell(
    recycling: tuple[Tokens, int, float], reserve: Reserve
) -> None:
    tokens, count, side = recycling
    outcome = tokens.recycle(count, side, reserve)
    unchanged = plainly_kept(tokens, outcome)
    features = dict(zip(outcome.kept.tolist(), outcome.features, strict=True))
    for index in unchanged:
        assert torch.equal(features[index], tokens.features[index])

    cells = tokens.cells(set(range(len(tokens.structural))) - unchanged, side)
    shift = min(tokens.importance[~tokens.structural].min().item(), 0.0)
    total = {cell: sum(tokens.importance[index].item() - shift for index in members) for cell, members in cells.items()}
    winners = set()
    for cell, members in cells.items():
        place = min(members, key=lambda index: (-tokens.importance[index].item(), index))
        if place not in features:
            continue
        winners.add(cell)
        weights = tokens.importance[members] - shift
        if weights.sum() == 0:
            weights = torch.ones_like(weights)
        mean = (tokens.features[members] * weights.unsqueeze(-1)).sum(0) / weights.sum()
        torch.testing.assert_close(features[place], mean)
        low, high = tokens.features[members].min(0).values, tokens.features[members].max(0).values
        assert ((features[place] >= low - 1e-9) & (features[place] <= high + 1e-9)).all()
    assert len(winners) == len(outcome.recycled)
    losers = cells.keys() - winners
    if losers:
        assert reserve == "occupied"
        assert not unchanged - set(tokens.structural.nonzero().flatten().tolist())
        if winners:
            assert max(total[cell] for cell in losers) <= min(total[cell] for cell in winners) + 1e-9


def test_the_published_count_overshoots_where_more_cells_are_occupied() -> None:
    index = torch.arange(256)
    scores = torch.rand(256, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for reserve in ("occupied", "published"):
        outcome = recycle(
            torch.randn(256, 4),
            scores,
            64,
            torch.zeros_like(index),
            index // 16,
            index % 16,
            torch.zeros(256, dtype=torch.bool),
            side=3.0,
            reserve=reserve,
        )
        sizes[reserve] = len(outcome.kept)
    assert sizes == {"occupied": 64, "published": 72}


def test_cells_of_different_grids_are_apart() -> None:
    tokens = Tokens.random([(4, 4), (4, 4)], seed=3)
    outcome = tokens.recycle(8 + 10, side=8.0)
    assert tokens.grid[outcome.recycled].tolist() == [0, 1]


def test_cells_smaller_than_the_gap_between_tokens_change_nothing() -> None:
    tokens = Tokens.random([(5, 6)], seed=4)
    outcome = tokens.recycle(5 + 9, side=1.0)
    torch.testing.assert_close(outcome.features, tokens.features[outcome.kept])
    best = tokens.importance[~tokens.structural].sort(descending=True).values[:9]
    kept = outcome.kept[~tokens.structural[outcome.kept]]
    assert tokens.importance[kept].sort(descending=True).values.tolist() == best.tolist()


def test_nothing_is_recycled_where_nothing_is_dropped() -> None:
    tokens = Tokens.random([(3, 3)], seed=5)
    outcome = tokens.recycle(len(tokens.structural), side=2.0)
    assert outcome.kept.tolist() == list(range(12))
    assert outcome.recycled.tolist() == []
    assert torch.equal(outcome.features, tokens.features)


def test_equally_unimportant_tokens_are_averaged_plainly() -> None:
    tokens = Tokens.random([(2, 2)], seed=6)
    tokens.importance.zero_()
    outcome = tokens.recycle(3, side=2.0)
    content = (~tokens.structural).nonzero().flatten()
    assert outcome.recycled.tolist() == [0]
    torch.testing.assert_close(outcome.features[0], tokens.features[content].mean(0))


def test_negative_importance_never_turns_into_negative_weights() -> None:
    tokens = Tokens.random([(1, 3)], seed=7)
    tokens.importance[:3] = torch.tensor([-0.1, -0.3, -0.2])
    outcome = tokens.recycle(2, side=4.0)
    assert outcome.recycled.tolist() == [0]
    # Shifted by the least, -0.3, the weights are 0.2, 0 and 0.1.
    expected = (2 * tokens.features[0] + tokens.features[2]) / 3
    torch.testing.assert_close(outcome.features[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_keep_their_type(dtype: torch.dtype) -> None:
    tokens = Tokens.random([(6, 6)], seed=8)
    tokens.features = tokens.features.to(dtype)
    tokens.importance = tokens.importance.float()
    outcome = tokens.recycle(6 + 8, side=3.0)
    assert outcome.features.dtype == dtype
    unchanged = ~torch.isin(outcome.kept, outcome.recycled)
    assert torch.equal(outcome.features[unchanged], tokens.features[outcome.kept[unchanged]])
