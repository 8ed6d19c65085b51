"""Fair shares for tenants: which tenant is admitted, and which is served next.

:class:`FairQueue` is guarded by the engine's lock. :class:`RoundRobin` belongs to the engine's thread.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

from vflow_server.rpc.errors import CapacityExhausted


class Cancellable(Protocol):
    """Has a flag that says whether it was cancelled."""

    cancelled: bool


class Waiting(Protocol):
    """A task as the queue sees it."""

    tenant: str

    @property
    def ticket(self) -> Cancellable:
        """The handle of its submitter, who may cancel it."""
        ...


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """A bounded queue with a line for each tenant.

    Args:
        most: how many tasks may wait; a tenant that has none waiting, or few, may exceed it (see :func:`may_admit` and
            :func:`below_share`).
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: dict[str, deque[T]] = {}

    def __iter__(self) -> Iterator[T]:
        return (task for line in self._lines.values() for task in line)

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def put(self, task: T) -> None:
        """Add ``task`` at the end of its tenant's line.

        Raises:
            CapacityExhausted: too many tasks wait.
        """
        waiting = Counter({tenant: len(line) for tenant, line in self._lines.items()})
        if not (may_admit(waiting, task.tenant, self._most) or below_share(waiting, task.tenant, self._most)):
            raise CapacityExhausted(
                "queue",
                f"{self._most} requests may wait for the model at most; retry in a moment",
                metadata={"max_waiting": self._most},
            )
        self._lines.setdefault(task.tenant, deque()).append(task)

    def admit(self, running: Counter[str], most: int) -> T | None:
        """Remove and return the task that is to run next; None if no task waits or none may run.

        The tenant with the fewest running tasks comes first; among equals, the one that was served longest ago.

        Args:
            running: number of running tasks by tenant.
            most: how many tasks may run; a tenant that has none running may exceed it.
        """
        tenant = min(self._lines, key=lambda tenant: running[tenant], default=None)
        if tenant is None or not may_admit(running, tenant, most):
            return None
        task = self._lines[tenant][0]
        self._remove(task)
        return task

    def take_cancelled(self) -> list[T]:
        """Remove and return the tasks that were cancelled while they waited."""
        cancelled = [task for task in self if task.ticket.cancelled]
        for task in cancelled:
            self._remove(task)
        return cancelled

    def _remove(self, task: T) -> None:
        # A tenant that was served goes behind the other tenants.
        line = self._lines.pop(task.tenant)
        line.remove(task)
        if line:
            self._lines[task.tenant] = line


class Owned(Protocol):
    """Something that belongs to a tenant."""

    @property
    def tenant(self) -> str:
        """The tenant."""
        ...


W = TypeVar("W", bound=Owned)


class RoundRobin:
    """Serves tenants in turn. A tenant that has nothing waiting loses its place in the line."""

    def __init__(self) -> None:
        self._line: list[str] = []

    def order(self, waiting: Sequence[W]) -> list[W]:
        """``waiting`` in the order in which to serve it: one item of each tenant, then a second one of each, and so on.

        The tenant that was served longest ago comes first, a new one last. The items of one tenant stay in order.
        """
        present = dict.fromkeys(each.tenant for each in waiting)
        self._line = list(dict.fromkeys([*(tenant for tenant in self._line if tenant in present), *present]))
        lines = [[each for each in waiting if each.tenant == tenant] for tenant in self._line]
        return [each for column in zip_longest(*lines) for each in column if each is not None]

    def served(self, tenant: str) -> None:
        """Note that ``tenant`` was served."""
        self._line.remove(tenant)
        self._line.append(tenant)


def may_admit(taken: Counter[str], tenant: str, most: int) -> bool:
    """Whether ``tenant`` may take one more of ``most`` places; ``taken`` counts the places of each tenant.

    A tenant that has no place may exceed ``most`` by one, as long as fewer than twice ``most`` are taken. So one tenant
    cannot keep out the others, and the total stays bounded however many tenants there are.
    """
    return taken.total() < most or (not taken[tenant] and taken.total() < 2 * most)


def below_share(taken: Counter[str], tenant: str, most: int) -> bool:
    """Whether ``tenant`` has less than an equal share of ``most`` places, and may exceed ``most``.

    It may as long as fewer than one and a half times ``most`` are taken: the rest of twice ``most`` is left to tenants
    that have none. ``taken`` counts the places of each tenant.
    """
    tenants = {name for name, places in taken.items() if places} | {tenant}
    return taken[tenant] < most // len(tenants) and 2 * taken.total() < 3 * most
