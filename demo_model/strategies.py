"""Strategies for the embedded model, which it brings along in its configuration.

The published presets were tuned for another model, on maps of 27 x 27 tokens a tile. On this model's 16 x 16 they keep
hardly more right answers than random pruning does, and the same method with numbers of its own fewer than methods that
value diversity. Importance and diversity together keep nearly all (``benchmarks/fidelity.py``).
"""

import json
from dataclasses import replace

from vflowopt.compression.strategy import Strategy

BUDGETS = (0.1, 0.25, 0.5)

THRESHOLD = 2.0
"""Sensitivity of the focus set. Chosen with ``GRID`` among 0, 2 and 5, with cells of 4 or without recycling, by exact
match on 40 held-out pictures that no reported figure uses."""

GRID = 4.0
"""Side of a recycling cell in tokens, where there is recycling."""

DIVERSITY = 0.7
"""Weight of diversity. From 0.5 to 1 the answers are the same within noise, on 160 held-out pictures that no reported
figure uses."""

LEADING = (1.3, 0.95)
"""First ratio over the budget, and second ratio. From (1.2, 1) to (1.5, 0.9) the answers are the same within noise:
this model hardly looks at a picture in its last layers."""


def brought(layers: int) -> dict[str, object]:
    """What the model's configuration holds: by name, the one to begin with first.

    ``diverse-*``: importance and diversity, without recycling, whose places serve better as plain tokens.
    ``tuned-*``: the method as published, ratios included, with this model's threshold and cells.
    """
    strategies = {}
    for budget in BUDGETS:
        strategies[f"diverse-{budget * 100:.0f}"] = Strategy.from_budget(
            budget, layers, (LEADING[0] * budget, LEADING[1]), threshold=THRESHOLD, diversity=DIVERSITY
        )
    for budget in BUDGETS:
        preset = Strategy.preset(budget, layers)
        strategies[f"tuned-{budget * 100:.0f}"] = replace(preset, threshold=THRESHOLD, grid=GRID)
    return {name: json.loads(strategy.to_json()) for name, strategy in strategies.items()}
