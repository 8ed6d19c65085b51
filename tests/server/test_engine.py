"""The engine alone, on work made of plain generators."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager

import pytest

from vflow_server.engine import Engine, WorkCancelled
from vflow_server.errors import ServiceError

Emit = Callable[[object], None]


@asynccontextmanager
async def running_engine(
    waiting: int = 4, running: int = 4, on_death: Callable[[], None] = lambda: None
) -> AsyncIterator[Engine]:
    engine = Engine(waiting=waiting, running=running, on_death=on_death)
    engine.start()
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop)


def play(scene: Coroutine[None, None, None]) -> None:
    """Run a scene, which fails if it hangs."""
    asyncio.run(asyncio.wait_for(scene, 20))


def counting(steps: int) -> Callable[[Emit], Generator[None, None, str]]:
    def work(emit: Emit) -> Generator[None, None, str]:
        for step in range(steps):
            emit(step)
            yield
        return "done"

    return work


class Endless:
    """Work that never ends by itself and knows how far it came and whether it was undone."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.undone = threading.Event()

    def __call__(self, emit: Emit) -> Generator[None, None, None]:
        self.begun.set()
        try:
            while True:
                yield
        finally:
            self.undone.set()


async def begun(work: Endless) -> None:
    assert await asyncio.to_thread(work.begun.wait, 5)


def test_events_come_in_order_and_the_result_last() -> None:
    async def scene() -> None:
        async with running_engine() as engine:
            ticket = engine.submit(counting(3))
            assert [event async for event in ticket.events()] == [0, 1, 2]
            assert await ticket.result() == "done"

    play(scene())


def test_running_work_takes_turns() -> None:
    order: list[str] = []

    def noting(name: str) -> Callable[[Emit], Generator[None, None, None]]:
        def work(emit: Emit) -> Generator[None, None, None]:
            for _ in range(3):
                order.append(name)
                yield

        return work

    async def scene() -> None:
        async with running_engine() as engine:
            gate = threading.Event()

            def wait(emit: Emit) -> Generator[None, None, None]:
                gate.wait(5)
                yield

            tickets = [engine.submit(wait), engine.submit(noting("a")), engine.submit(noting("b"))]
            gate.set()
            for ticket in tickets:
                await ticket.result()

    play(scene())
    assert "".join(order) == "ababab"


def test_cancelled_work_is_undone_and_its_successor_runs() -> None:
    async def scene() -> None:
        async with running_engine(running=1) as engine:
            endless = Endless()
            ticket, successor = engine.submit(endless), engine.submit(counting(1))
            await begun(endless)
            ticket.cancel()
            ticket.cancel()
            with pytest.raises(WorkCancelled):
                await ticket.result()
            assert endless.undone.is_set()
            assert await successor.result() == "done"

    play(scene())


def test_work_cancelled_while_it_waits_never_begins() -> None:
    async def scene() -> None:
        async with running_engine(running=1) as engine:
            first, second = Endless(), Endless()
            engine.submit(first)
            ticket = engine.submit(second)
            await begun(first)
            ticket.cancel()
            await ticket.ended()
            assert not second.begun.is_set()

    play(scene())


def test_too_much_waiting_work_is_refused_with_a_time_to_retry_and_housekeeping_is_not() -> None:
    async def scene() -> None:
        async with running_engine(waiting=1, running=1) as engine:
            endless = Endless()
            engine.submit(endless)
            await begun(endless)
            engine.submit(counting(1))
            with pytest.raises(ServiceError) as refused:
                engine.submit(counting(1))
            assert refused.value.reason == "CAPACITY_EXHAUSTED" and refused.value.retry_after
            assert await engine.submit(counting(1), housekeeping=True).result() == "done"

    play(scene())


def test_work_that_fails_fails_alone() -> None:
    def failing(emit: Emit) -> Generator[None, None, None]:
        yield
        raise ZeroDivisionError

    async def scene() -> None:
        async with running_engine() as engine:
            with pytest.raises(ZeroDivisionError):
                await engine.submit(failing).result()
            assert await engine.submit(counting(1)).result() == "done"

    play(scene())


def test_stopping_undoes_all_work_and_takes_no_more() -> None:
    async def scene() -> None:
        async with running_engine(running=1) as engine:
            endless = Endless()
            running, waiting = engine.submit(endless), engine.submit(counting(1))
            await begun(endless)
            await asyncio.to_thread(engine.stop)
            for ticket in (running, waiting):
                with pytest.raises(ServiceError, match="stopping"):
                    await ticket.result()
            assert endless.undone.is_set()
            with pytest.raises(ServiceError, match="stopping"):
                engine.submit(counting(1))

    play(scene())


def test_a_dead_engine_says_so_to_everybody() -> None:
    def deadly(emit: Emit) -> Generator[None, None, None]:
        yield
        raise SystemExit

    async def scene() -> None:
        died = threading.Event()
        async with running_engine(on_death=died.set) as engine:
            beside = engine.submit(Endless())
            deathbed = engine.submit(deadly)
            for ticket in (deathbed, beside):
                with pytest.raises(ServiceError) as refused:
                    await ticket.result()
                assert refused.value.reason == "ENGINE_FAILED"
            assert died.is_set() and not engine.alive
            with pytest.raises(ServiceError, match="restarted"):
                engine.submit(counting(1))

    play(scene())
