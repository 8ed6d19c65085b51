"""A part that the service needs ends or stands still: health says so, and the process ends to be started again."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.restartable_server import Parent, RestartableServer
from tests.server.waiting import until
from vflow_client import VFlowError
from vflow_server.exit_code import FAILED
from vflow_server.watchdog import watchdog as watchdog_module
from vflow_server.watchdog.pulse import Pulse, PulsedExecutor
from vflow_server.watchdog.watchdog import Watchdog

BREAKING = """
import os, time
import vflow_server.app
from {module} import {owner}
import vflow_server.watchdog.watchdog
vflow_server.app.MARGIN = 0.5
vflow_server.watchdog.watchdog.LOOK_EVERY = 0.1
working = {owner}.{method}
def broken(*arguments, **named):
    if os.path.exists({trigger!r}):
        {fault}
    return working(*arguments, **named)
{owner}.{method} = broken
"""
"""Breaks a method from the moment on at which a file is there."""

ENDS, STANDS_STILL = "raise SystemExit", "time.sleep(1000)"
ENGINE = ("vflow_server.engine.engine", "Engine", "_round")
ENCODER = ("vflowopt.models.interface", "MultimodalModel", "encoding")
JOURNAL = ("vflow_server.store.journal", "Journal", "_process")
EVENT_LOOP = ("vflow_server.sessions.sessions", "SessionStore", "create")
LOG = ("vflow_server.telemetry.log_sink", "LogSink", "_write")
EXPIRY = ("vflow_server.sessions.sessions", "SessionStore", "__iter__")


@pytest.mark.parametrize(
    ("broken", "fault", "part", "because"),
    [
        (ENGINE, ENDS, "engine", "died of an exception"),
        (ENGINE, STANDS_STILL, "engine", "stood still"),
        (ENCODER, STANDS_STILL, "encoder", "stood still"),
        (JOURNAL, ENDS, "journal", "has ended"),
        (JOURNAL, STANDS_STILL, "journal", "stood still"),
        (EXPIRY, "raise ValueError", "expiry of sessions", "has ended"),
        (EVENT_LOOP, STANDS_STILL, "event loop", "stood still"),
        (LOG, ENDS, "log", "has ended"),
    ],
)
def test_a_part_that_fails_ends_the_process(
    broken: tuple[str, str, str],
    fault: str,
    part: str,
    because: str,
    parent: Parent,
    model_folder: Path,
    tmp_path: Path,
    picture: bytes,
) -> None:
    trigger = tmp_path / "trigger"
    module, owner, method = broken
    before = BREAKING.format(module=module, owner=owner, method=method, fault=fault, trigger=str(trigger))
    server = RestartableServer(
        parent,
        tmp_path / "log",
        before,
        model=model_folder,
        kv_budget="32MiB",
        data=tmp_path / "data",
        watchdog_timeout="500ms",
        idle_timeout="1s",
        grace="500ms",
    )
    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor() as callers:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        trigger.touch()
        calling = callers.submit(call, server, picture)
        try:
            last = next(watch).status
        except grpc.RpcError:  # as when the event loop stands still: nothing can be said
            last = health_pb2.HealthCheckResponse.NOT_SERVING
        assert last == health_pb2.HealthCheckResponse.NOT_SERVING
        ended = callers.submit(server.ended)
        try:
            assert ended.result(30) == FAILED
        finally:
            if not ended.done():
                server.process.kill()
        calling.result()
    if part != "log":
        (told,) = [line for line in server.logged() if line["event"] == "a part that the service needs has failed"]
        assert told["part"] == part and because in str(told["because"])
        assert (because != "stood still") or "in broken" in str(told["stack"])


def call(server: RestartableServer, picture: bytes) -> None:
    try:
        with server.client() as client, client.session() as session:
            session.ask("What?", images=[picture], max_new_tokens=4).read()
    except (VFlowError, AssertionError):
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "LOOK_EVERY", 0.02)


class Watching:
    """A watchdog on an event loop of its own.

    Args:
        bound: its bound.
        parts: called with it on the loop, before it starts.
    """

    def __init__(self, bound: float | None, parts: Callable[[Watchdog], None]) -> None:
        self.failures = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.watchdog = Watchdog(bound, self._failed)
        self.run(self._begin(parts))

    def run(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(5)  # type: ignore[arg-type]

    def close(self) -> None:
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _begin(self, parts: Callable[[Watchdog], None]) -> None:
        parts(self.watchdog)
        self.watchdog.start()

    async def _end(self) -> None:
        self.watchdog.stop()
        await asyncio.sleep(0)  # so that its task ends

    def _failed(self) -> None:
        self.failures += 1


@pytest.fixture
def watching(quick: None) -> Iterator[Callable[..., Watching]]:
    made: list[Watching] = []

    def watch(bound: float | None, parts: Callable[[Watchdog], None] = lambda watchdog: None) -> Watching:
        made.append(Watching(bound, parts))
        return made[-1]

    yield watch
    for each in made:
        each.close()


def test_a_part_that_waits_for_work_may_wait_forever(watching: Callable[..., Watching]) -> None:
    executor = PulsedExecutor("idle")
    executor.submit(lambda: None).result()
    watched = watching(0.04, lambda watchdog: watchdog.watch("idle", executor.pulse))
    time.sleep(0.3)
    assert watched.failures == 0
    executor.shutdown()
    until(lambda: watched.failures == 1)


def test_a_thread_that_computes_may_take_longer_but_not_forever(watching: Callable[..., Watching]) -> None:
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            sum(range(10_000))

    executor = PulsedExecutor("computing")
    try:
        executor.submit(compute)
        watched = watching(0.1, lambda watchdog: watchdog.watch("computing", executor.pulse, computes=True))
        time.sleep(0.5)
        assert watched.failures == 0, "it computes"
        until(lambda: watched.failures == 1)
    finally:
        over.set()
        executor.shutdown()


def test_only_the_first_failure_counts_and_none_after_the_stop(watching: Callable[..., Watching]) -> None:
    watched = watching(None)
    for _ in range(3):
        watched.watchdog.fail("a part", "it is tried")
    assert watched.failures == 1
    stopped = watching(None)
    stopped.close()
    stopped.watchdog.fail("a part", "it is tried")
    assert stopped.failures == 0
    stopped.close = lambda: None  # type: ignore[method-assign]


def test_without_a_bound_only_an_end_is_a_failure(watching: Callable[..., Watching]) -> None:
    pulse = Pulse()
    over = threading.Event()

    def stand_still() -> None:
        pulse.begin()
        pulse.beat()
        over.wait()

    threading.Thread(target=stand_still).start()
    watched = watching(None, lambda watchdog: watchdog.watch("still", pulse))
    time.sleep(0.2)
    assert watched.failures == 0
    over.set()
    until(lambda: watched.failures == 1)
