"""A rota: tenants take turns at what there is too little of in one step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol, TypeVar


class Owned(Protocol):
    """What is somebody's."""

    tenant: str


T = TypeVar("T", bound=Owned)


class Rota:
    """Remembers who was served last. A tenant that has nothing waiting loses its place in the line."""

    def __init__(self) -> None:
        self._line: list[str] = []

    def order(self, waiting: Sequence[T]) -> list[T]:
        """``waiting`` in the order in which to serve it: one of each tenant, then a second one of each, and so on.

        The tenant that was served longest ago comes first, one that is new last; what is of one tenant stays in order.
        """
        present = dict.fromkeys(each.tenant for each in waiting)
        self._line = list(dict.fromkeys([*(tenant for tenant in self._line if tenant in present), *present]))
        lines = [[each for each in waiting if each.tenant == tenant] for tenant in self._line]
        return [each for column in zip_longest(*lines) for each in column if each is not None]

    def served(self, tenant: str) -> None:
        """``tenant`` had its turn."""
        self._line.remove(tenant)
        self._line.append(tenant)
