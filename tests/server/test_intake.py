"""The pace of messages: what senders owe together, and what the event loop's time counts for."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from vflow_server.rpc import intake
from vflow_server.rpc.intake import BURST, LOOP_SECOND, PACE, Bounds, Intake, bind_request, reading_request

MESSAGE = 1 << 20


class Clock:
    """Stands in for the ``time`` module of the intake."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(intake, "time", clock)
    return clock


def ready(taking: Intake, name: str) -> bool:
    """Whether a message of this sender is taken at once."""

    async def read() -> bytes:
        return b""

    async def attempt() -> bool:
        try:
            async with asyncio.timeout(0.05):
                await taking.receive(name, read)
        except TimeoutError:
            return False
        return True

    return run(attempt)


def run(work: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
    return asyncio.run(work())


def an_intake() -> Intake:
    return Intake(Bounds(memory=512 << 20, most_bytes=64 << 20))


def test_senders_share_the_burst(clock: Clock) -> None:
    alone, crowd = an_intake(), an_intake()
    alone.charge("a", BURST // 2)
    assert ready(alone, "a")
    for number in range(4):
        crowd.charge(str(number), BURST // 2)
    assert not ready(crowd, "0")
    assert ready(crowd, "somebody else")


def test_who_has_kept_its_pace_may_send_again(clock: Clock) -> None:
    taking = an_intake()
    taking.charge("a", BURST + PACE)
    assert not ready(taking, "a")
    clock.now += 1.1
    assert ready(taking, "a")


def test_the_time_of_the_event_loop_is_charged_to_the_sender(clock: Clock) -> None:
    taking = an_intake()

    def read_for(seconds: float) -> None:
        with reading_request():
            clock.now += seconds

    bind_request(lambda: None, lambda seconds: taking.charge_time("a", seconds))
    read_for(0.001)
    assert ready(taking, "a")
    read_for(2 * BURST / LOOP_SECOND + 1)
    assert not ready(taking, "a")
    assert ready(taking, "b")
