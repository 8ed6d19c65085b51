"""Fair shares for tenants: who is admitted, who waits, and whose turn is next.

Belongs to whoever holds the engine's lock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

from vflow_server.rpc.errors import CapacityExhausted


class Cancellable(Protocol):
    """What may be cancelled."""

    cancelled: bool


class Waiting(Protocol):
    """What waits."""

    tenant: str

    @property
    def ticket(self) -> Cancellable:
        """Whether it is still wanted."""
        ...


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """Bounded lines, one for each tenant that has work waiting.

    Args:
        most: how much work may wait; a tenant that has none waiting may go beyond.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: dict[str, deque[T]] = {}

    def __iter__(self) -> Iterator[T]:
        return (task for line in self._lines.values() for task in line)

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def put(self, task: T) -> None:
        """Have ``task`` wait.

        Raises:
            CapacityExhausted: too much work waits.
        """
        waiting = Counter({tenant: len(line) for tenant, line in self._lines.items()})
        if not may_admit(waiting, task.tenant, self._most):
            raise CapacityExhausted(
                "queue",
                f"{waiting.total()} requests already wait for the model; retry in a moment",
                metadata={"waiting": waiting.total()},
            )
        self._lines.setdefault(task.tenant, deque()).append(task)

    def admit(self, running: Counter[str], most: int) -> T | None:
        """The task that is to run next, which waits no longer; None where nothing may or nothing waits.

        The tenant that has least running comes first; among equals, the one whose line moved on longest ago.

        Args:
            running: how much work of each tenant is running.
            most: how much may run; a tenant that has none running may go beyond.
        """
        tenant = min(self._lines, key=lambda tenant: running[tenant], default=None)
        if tenant is None or not may_admit(running, tenant, most):
            return None
        task = self._lines[tenant][0]
        self._remove(task)
        return task

    def take_cancelled(self) -> list[T]:
        """The tasks that were cancelled while they waited; they wait no longer."""
        cancelled = [task for task in self if task.ticket.cancelled]
        for task in cancelled:
            self._remove(task)
        return cancelled

    def _remove(self, task: T) -> None:
        # Whose line moved on stands behind the other lines.
        line = self._lines.pop(task.tenant)
        line.remove(task)
        if line:
            self._lines[task.tenant] = line


class Owned(Protocol):
    """What belongs to a tenant."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        ...


W = TypeVar("W", bound=Owned)


class RoundRobin:
    """Remembers who was served last. A tenant that has nothing waiting loses its place in the line."""

    def __init__(self) -> None:
        self._line: list[str] = []

    def order(self, waiting: Sequence[W]) -> list[W]:
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


def may_admit(taken: Counter[str], tenant: str, most: int) -> bool:
    """Whether ``tenant`` may take another place of ``most``, of which each tenant has ``taken`` so many.

    A tenant that has none may go beyond ``most`` by one, until twice as many are taken: so nobody is kept out because
    another took all there were, and however many tenants there are, the bound is a bound.
    """
    return taken.total() < most or (not taken[tenant] and taken.total() < 2 * most)
