"""The strategies that a search may try: all that meet one budget, and no others.

Each is a point of the unit cube. Every point is feasible, for any number of stages and any division of the layers among
them: the stages before a stage bound what it may keep of the budget, and the last stage takes the rest. So a search
needs no constraints and wastes no trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from vflowopt.compression.strategy import Strategy

Point = tuple[float, ...]
"""Coordinates from 0 to 1: one for each stage but the last, then threshold, alpha, grid and, if searched, diversity."""

_SPARED = 0.25
"""Share of what is left of the budget, per layer, that a stage must leave to each later layer on average.

With the paper's stages, R1 then reaches from the budget to 2.5 times the budget, which includes the published range (1
to 1.5 times). R2 likewise starts at what every later layer gets if nothing else is dropped.
"""

_THRESHOLD = 50.0
"""The highest threshold (method section 4), on a logarithmic scale: most of the effect is below 5."""

_GRIDS = (2.0, 24.0)
"""Sides of a recycling cell, on a logarithmic scale. The paper starts at 3, for maps of 27 x 27 tokens; on coarser maps
smaller cells make sense."""

_RECYCLED = 0.875
"""Share of the grid's coordinate that recycles. Above it, where cells would be whole maps, nothing is recycled."""


class SearchSpace:
    """All strategies of one budget that differ from ``base`` in ratios, threshold, alpha and grid alone.

    If the base has a weight of diversity, that weight is searched, too. A base without one stays within the paper.

    Args:
        base: gives the stages and every field that is not searched.
        budget: layer-average retention in (0, 1].
        layers: decoder layers.

    Attributes:
        dimensions: coordinates of a point.

    Raises:
        StrategyError: field "budget" where it is out of range; "starts" where a stage begins past the last layer.
    """

    def __init__(self, base: Strategy, budget: float, layers: int) -> None:
        Strategy.from_budget(budget, layers, ())  # one stage meets any budget in range; this raises for others
        self._base = base
        self._budget = budget
        self._layers = layers
        self._spans = base.spans(layers)
        self._diverse = base.diversity > 0.0
        self.dimensions = len(self._spans) + 2 + self._diverse

    def strategy(self, point: Sequence[float]) -> Strategy:
        """The strategy of a point. Raises ValueError if a coordinate is missing or not in [0, 1]."""
        if len(point) != self.dimensions or not all(0.0 <= coordinate <= 1.0 for coordinate in point):
            raise ValueError(f"expected {self.dimensions} coordinates from 0 to 1, got {tuple(point)}")
        stages, (threshold, alpha, grid, *diversity) = point[: len(self._spans) - 1], point[len(self._spans) - 1 :]
        kept: list[float] = []
        for coordinate, (low, high) in zip(stages, self._bounds(kept), strict=True):
            kept.append(low + coordinate * (high - low))
        ratios = [min(after / before, 1.0) for before, after in zip([1.0, *kept], kept, strict=False)]
        return replace(
            self._base,
            ratios=Strategy.from_budget(self._budget, self._layers, ratios, starts=self._base.starts).ratios,
            threshold=math.expm1(threshold * math.log1p(_THRESHOLD)),
            alpha=2.0 * alpha - 1.0,
            grid=_GRIDS[0] * (_GRIDS[1] / _GRIDS[0]) ** (grid / _RECYCLED) if grid < _RECYCLED else None,
            diversity=diversity[0] if self._diverse else 0.0,
        )

    def nearest(self, strategy: Strategy) -> Point:
        """The point of the strategy in this space that is closest to another strategy, scaled to the budget.

        Args:
            strategy: has as many stages as the base.
        """
        scale = self._budget / strategy.budget(self._layers)
        kept: list[float] = []
        point: list[float] = []
        for fraction, (low, high) in zip(strategy.retention, self._bounds(kept), strict=False):
            kept.append(min(max(fraction * scale, low), high))
            point.append((kept[-1] - low) / (high - low) if high > low else 0.0)
        grid = (1.0 + _RECYCLED) / 2.0
        if strategy.grid is not None:
            grid = _RECYCLED * math.log(strategy.grid / _GRIDS[0]) / math.log(_GRIDS[1] / _GRIDS[0])
            grid = min(grid, math.nextafter(_RECYCLED, 0.0))
        point += [math.log1p(strategy.threshold) / math.log1p(_THRESHOLD), (strategy.alpha + 1.0) / 2.0, grid]
        point += [strategy.diversity] * self._diverse
        return tuple(min(max(coordinate, 0.0), 1.0) for coordinate in point)

    def fitted_base(self) -> tuple[Point, Strategy]:
        """The point and the strategy of the base if it meets the budget, otherwise of the strategy closest to it."""
        point = self.nearest(self._base)
        if abs(self._base.budget(self._layers) - self._budget) < 1e-9:
            return point, self._base
        return point, self.strategy(point)

    def _bounds(self, kept: Sequence[float]) -> Iterator[tuple[float, float]]:
        """For each stage but the last, the lowest and highest retention; the caller appends each choice to ``kept``."""
        left = self._budget * self._layers
        for stage, span in enumerate(self._spans[:-1]):
            later = sum(self._spans[stage + 1 :])
            before = kept[-1] if kept else 1.0
            # The same for all layers from here on: with less here, the later ones could not use up the budget.
            low = min(left / (span + later), before)
            yield low, max(low, min((left - _SPARED * low * later) / span, before))
            left -= kept[stage] * span
