"""Strategies for the embedded model, which it brings along in its configuration.

The published presets were tuned for another model, on maps of 27 x 27 tokens a tile. On this model's 16 x 16 they keep
hardly more right answers than random pruning does (``benchmarks/retention.py``).
"""

import json
from dataclasses import replace

from vflowopt.strategy import Strategy

THRESHOLD = 2.0
"""Sensitivity of the focus set. Chosen with ``GRID`` among 0, 2 and 5, with cells of 4 or without recycling, by exact
match on 40 held-out pictures that no reported figure uses."""

GRID = 4.0
"""Side of a recycling cell in tokens."""


def tuned(layers: int) -> dict[str, object]:
    """The published ratios at each budget with the embedded model's threshold and cells, as configuration."""
    strategies = {
        f"tuned-{budget:.0%}".removesuffix("%"): replace(
            Strategy.preset(budget, layers), threshold=THRESHOLD, grid=GRID
        )
        for budget in (0.5, 0.25, 0.1)
    }
    return {name: json.loads(strategy.to_json()) for name, strategy in strategies.items()}
