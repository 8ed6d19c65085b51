"""The queue in front of the workers that decode: bounded, and fair between tenants."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from vflow_server.rpc.errors import CapacityExhausted
from vflowopt.media.picture import Picture

HALF_LIFE = 10.0
"""Seconds after which half of the time that a tenant has used is forgotten."""

_BYTE, _PIXEL = 50e-9, 100e-9
"""Seconds that a file is expected to take for each of its bytes, and for each pixel that it may have."""


@dataclass(eq=False)
class Job:
    """A file to decode.

    Attributes:
        tenant: the tenant that sent it.
        data: the file.
        most_pixels: pixels that it may have where it is decoded next.
        result: the picture, or why there is none.
    """

    tenant: str
    data: bytes
    most_pixels: int
    result: asyncio.Future[Picture] = field(default_factory=lambda: asyncio.Future())

    @property
    def expected_seconds(self) -> float:
        """How long decoding will take, at a guess."""
        return len(self.data) * _BYTE + self.most_pixels * _PIXEL


class UsedTime:
    """The processor time that each tenant has lately used of the workers, in seconds."""

    def __init__(self) -> None:
        self._used: dict[str, tuple[float, float]] = {}

    def of(self, tenant: str) -> float:
        """Seconds that ``tenant`` has used; half of them are forgotten after :data:`HALF_LIFE`."""
        used, at = self._used.get(tenant, (0.0, 0.0))
        return used * 0.5 ** ((time.monotonic() - at) / HALF_LIFE) if used else 0.0

    def add(self, tenant: str, seconds: float) -> None:
        """Note that ``tenant`` has used ``seconds`` more."""
        self._used[tenant] = (self.of(tenant) + seconds, time.monotonic())
        # Who has used next to nothing need not be remembered.
        self._used = {each: used for each, used in self._used.items() if each == tenant or self.of(each) > 1e-3}


class DecodingQueue:
    """Files that wait. Time decides whose is next, not turns: a slow file then costs its tenant as many fast ones.

    Args:
        used: the time that tenants have used, of all queues.
        most: how many files may wait.
        most_bytes: bytes that they may have together.
    """

    def __init__(self, used: UsedTime, *, most: int, most_bytes: int) -> None:
        self._used = used
        self._most = most
        self._most_bytes = most_bytes
        self._jobs: list[Job] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Add ``job``. If there is no room for it, the latest job of the tenant with the most waiting is refused."""
        self._jobs.append(job)
        while len(self._jobs) > self._most or sum(len(each.data) for each in self._jobs) > self._most_bytes:
            longest = max(self._weights().items(), key=lambda entry: entry[1])[0]
            last = [each for each in self._jobs if each.tenant == longest][-1]
            self._jobs.remove(last)
            if not last.result.done():
                last.result.set_exception(
                    CapacityExhausted("picture_decoding", "too many pictures wait to be decoded; retry in a moment")
                )

    def remove(self, job: Job) -> bool:
        """Remove ``job``; False if it does not wait here."""
        if job not in self._jobs:
            return False
        self._jobs.remove(job)
        return True

    def first(self, running: Counter[str]) -> Job | None:
        """The job that is to be decoded next; None if none waits.

        A tenant with fewer jobs running comes first, then one that will have used less time after its job. The jobs of
        one tenant stay in order.

        Args:
            running: number of jobs of each tenant that are decoded here.
        """
        firsts = {job.tenant: job for job in reversed(self._jobs)}.values()
        return min(
            firsts,
            key=lambda job: (running[job.tenant], self._used.of(job.tenant) + job.expected_seconds),
            default=None,
        )

    def _weights(self) -> Counter[str]:
        """How much of the queue each tenant takes, in bytes; a small file takes its part of the number of files."""
        least = self._most_bytes // self._most
        weights: Counter[str] = Counter()
        for job in self._jobs:
            weights[job.tenant] += max(len(job.data), least)
        return weights
