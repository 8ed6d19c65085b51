"""A tenant that does no harm: what it gets from the service while others attack."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

import vflow_client
from benchmarks.memory import resident_bytes
from vflow_client import RetryPolicy, VFlowError

STREAMS = 2
_PATIENCE = 60.0
"""Seconds after which a call of the tenant has failed."""


@dataclass
class Seen:
    """What the tenant saw.

    Attributes:
        gaps: seconds between the tokens of its answers.
        pictures: seconds that its small pictures took.
        checks: seconds that health checks took, each on a connection of its own.
        failures: its calls that failed, and the checks that did not say SERVING, with the reason.
        resident: bytes of memory that the service used at most, its own processes included.
    """

    gaps: list[float] = field(default_factory=list)
    pictures: list[float] = field(default_factory=list)
    checks: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    resident: int = 0

    def p95_ms(self) -> float:
        """The 95th percentile of the time between two tokens, in milliseconds; infinite if there were none."""
        return float(np.percentile(self.gaps, 95)) * 1000 if self.gaps else float("inf")

    def add(self, other: Seen) -> None:
        """Add what was seen at another time."""
        self.gaps += other.gaps
        self.pictures += other.pictures
        self.checks += other.checks
        self.failures += other.failures
        self.resident = max(self.resident, other.resident)


class Bystander:
    """Streams answers, sends small pictures and checks the health, each on a thread of its own.

    Args:
        address: the service's host and port.
        token: the tenant's.
        process: the service's process.
    """

    def __init__(self, address: str, token: str, process: int) -> None:
        self._address = address
        self._token = token
        self._process = process
        self._enough = threading.Event()
        self._seen = Seen()

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """Use the service within the block; what was seen is complete after it."""
        self._enough.clear()
        seen = self._seen = Seen()
        lives = [self._stream] * STREAMS + [self._show, self._check, self._weigh]
        threads = [threading.Thread(target=self._live, args=(life,)) for life in lives]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            self._enough.set()
            for thread in threads:
                thread.join()

    def _live(self, life: Callable[[], None]) -> None:
        while not self._enough.is_set():
            try:
                life()
            except (VFlowError, grpc.RpcError, psutil.Error) as error:
                self._seen.failures.append(repr(error)[:200])
                time.sleep(0.2)

    def _stream(self) -> None:
        with self._client() as client, client.session() as session:
            session.add_image(_small_picture())
            while not self._enough.is_set():
                before: float | None = None
                with session.ask("What is it?", max_new_tokens=64, min_new_tokens=64) as answer:
                    for _ in answer:
                        now = time.perf_counter()
                        if before is not None:
                            self._seen.gaps.append(now - before)
                        before = now
                        if self._enough.is_set():
                            break
                if session.state().turn_count >= 8:
                    return

    def _show(self) -> None:
        with self._client() as client, client.session() as session:
            while not self._enough.wait(0.5):
                picture, begun = _small_picture(), time.perf_counter()
                session.add_image(picture)
                self._seen.pictures.append(time.perf_counter() - begun)
                if session.state().image_count >= 16:
                    return

    def _check(self) -> None:
        if self._enough.wait(0.5):
            return
        begun = time.perf_counter()
        with grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            request = health_pb2.HealthCheckRequest()
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_PATIENCE)
        self._seen.checks.append(time.perf_counter() - begun)
        if response.status != health_pb2.HealthCheckResponse.SERVING:
            self._seen.failures.append(f"the health is {response.status}")

    def _weigh(self) -> None:
        self._seen.resident = max(self._seen.resident, resident_bytes(self._process))
        self._enough.wait(0.2)

    def _client(self) -> vflow_client.Client:
        return vflow_client.connect(self._address, token=self._token, timeout=_PATIENCE, retry=RetryPolicy(attempts=1))


def _small_picture() -> bytes:
    """A new picture of 60 x 60 pixels."""
    file = io.BytesIO()
    pixels = np.random.default_rng().integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
