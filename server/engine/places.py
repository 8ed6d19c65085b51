"""Places that there are only so many of, shared by tenants."""

from __future__ import annotations

from collections import Counter


def has_place(taken: Counter[str], tenant: str, most: int) -> bool:
    """Whether ``tenant`` may take another place of ``most``, of which each tenant has ``taken`` so many.

    A tenant that has none may go beyond ``most`` by one, until twice as many are taken: so nobody is kept out because
    another took all there were, and however many tenants there are, the bound is a bound.
    """
    return taken.total() < most or (not taken[tenant] and taken.total() < 2 * most)
