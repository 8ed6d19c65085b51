"""The engine alone, on work made of plain generators."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from vflow_server.engine.engine import Engine, Steps, Task, WorkCancelled
from vflow_server.engine.fair_queue import FairQueue
from vflow_server.engine.ops import Wait
from vflow_server.rpc.errors import ServiceError

Emit = Callable[[object], None]

TENANT = "somebody"


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
            ticket = engine.submit(counting(3), TENANT)
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

            tickets = [
                engine.submit(wait, TENANT),
                engine.submit(noting("a"), TENANT),
                engine.submit(noting("b"), TENANT),
            ]
            gate.set()
            for ticket in tickets:
                await ticket.result()

    play(scene())
    assert "".join(order) == "ababab"


def test_cancelled_work_is_undone_and_its_successor_runs() -> None:
    async def scene() -> None:
        async with running_engine(running=1) as engine:
            endless = Endless()
            ticket, successor = engine.submit(endless, TENANT), engine.submit(counting(1), TENANT)
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
            engine.submit(first, TENANT)
            ticket = engine.submit(second, TENANT)
            await begun(first)
            ticket.cancel()
            await ticket.ended()
            assert not second.begun.is_set()

    play(scene())


def test_too_much_waiting_work_is_refused_with_a_time_to_retry_and_a_call_is_not() -> None:
    async def scene() -> None:
        async with running_engine(waiting=1, running=1) as engine:
            endless = Endless()
            engine.submit(endless, TENANT)
            await begun(endless)
            engine.submit(counting(1), TENANT)
            with pytest.raises(ServiceError) as refused:
                engine.submit(counting(1), TENANT)
            assert refused.value.reason == "CAPACITY_EXHAUSTED" and refused.value.retry_after
            assert await engine.call(lambda: "done", TENANT).result() == "done"

    play(scene())


def test_work_that_fails_fails_alone() -> None:
    def failing(emit: Emit) -> Generator[None, None, None]:
        yield
        raise ZeroDivisionError

    async def scene() -> None:
        async with running_engine() as engine:
            with pytest.raises(ZeroDivisionError):
                await engine.submit(failing, TENANT).result()
            assert await engine.submit(counting(1), TENANT).result() == "done"

    play(scene())


def test_stopping_undoes_all_work_and_takes_no_more() -> None:
    async def scene() -> None:
        async with running_engine(running=1) as engine:
            endless = Endless()
            running, waiting = engine.submit(endless, TENANT), engine.submit(counting(1), TENANT)
            await begun(endless)
            await asyncio.to_thread(engine.stop)
            for ticket in (running, waiting):
                with pytest.raises(ServiceError, match="stopping"):
                    await ticket.result()
            assert endless.undone.is_set()
            with pytest.raises(ServiceError, match="stopping"):
                engine.submit(counting(1), TENANT)

    play(scene())


def test_a_dead_engine_says_so_to_everybody() -> None:
    def deadly(emit: Emit) -> Generator[None, None, None]:
        yield
        raise SystemExit

    async def scene() -> None:
        died = threading.Event()
        async with running_engine(on_death=died.set) as engine:
            beside = engine.submit(Endless(), TENANT)
            deathbed = engine.submit(deadly, TENANT)
            for ticket in (deathbed, beside):
                with pytest.raises(ServiceError) as refused:
                    await ticket.result()
                assert refused.value.reason == "ENGINE_FAILED"
            assert died.is_set() and not engine.alive
            with pytest.raises(ServiceError, match="restarted"):
                engine.submit(counting(1), TENANT)

    play(scene())


def admitted(work: Sequence[str], running: int) -> list[str]:
    """In which order work of these tenants begins, all of it handed in before any ends; each takes two steps."""
    order: list[str] = []

    def noting(tenant: str) -> Callable[[Emit], Generator[None, None, None]]:
        def steps(emit: Emit) -> Generator[None, None, None]:
            order.append(tenant)
            yield
            yield

        return steps

    async def scene() -> None:
        async with running_engine(waiting=len(work), running=running) as engine:
            holding, gate = threading.Event(), threading.Event()

            def hold() -> None:
                holding.set()
                gate.wait(5)

            engine.call(hold, TENANT)
            await asyncio.to_thread(holding.wait, 5)
            tickets = [engine.submit(noting(tenant), tenant) for tenant in work]
            gate.set()
            for ticket in tickets:
                await ticket.result()

    play(scene())
    return order


def test_a_tenant_with_much_work_keeps_no_other_waiting() -> None:
    # All three run beside the first: a tenant that has nothing running begins at once.
    assert admitted([*"aaaaaaaaab", "c"], running=1)[:3] == ["a", "b", "c"]
    order = admitted([*"aaaaaaaaaabbbbb"], running=4)
    assert sorted(order[:4]) == [*"aabb"]
    assert max(order.index(tenant) for tenant in "ab") == 1


def test_the_work_of_one_tenant_begins_in_the_order_of_its_arrival() -> None:
    begun: list[int] = []

    def numbered(number: int) -> Callable[[Emit], Generator[None, None, None]]:
        def steps(emit: Emit) -> Generator[None, None, None]:
            begun.append(number)
            yield

        return steps

    async def scene() -> None:
        async with running_engine(waiting=12, running=2) as engine:
            tickets = [engine.submit(numbered(number), "ab"[number % 2]) for number in range(12)]
            for ticket in tickets:
                await ticket.result()

    play(scene())
    for parity in (0, 1):
        assert [number for number in begun if number % 2 == parity] == list(range(parity, 12, 2))


def test_a_tenant_that_fills_the_queue_fills_it_for_itself() -> None:
    async def scene() -> None:
        async with running_engine(waiting=2, running=1) as engine:
            endless = Endless()
            engine.submit(endless, "a")
            await begun(endless)
            for _ in range(2):
                engine.submit(counting(1), "a")
            with pytest.raises(ServiceError, match="may wait"):
                engine.submit(counting(1), "a")
            assert await engine.submit(counting(1), "b").result() == "done"

    play(scene())


@dataclass
class Cancellable:
    cancelled: bool = False


@dataclass
class Waiting:
    tenant: str
    ticket: Cancellable = field(default_factory=Cancellable)


def test_a_tenant_that_fills_the_queue_leaves_their_shares_to_others() -> None:
    queue: FairQueue[Waiting] = FairQueue(8)

    def admitted(tenant: str) -> int:
        """How many requests of a tenant are admitted of twenty."""
        before = len(queue)
        for _ in range(20):
            with suppress(ServiceError):
                queue.put(Waiting(tenant))
        return len(queue) - before

    assert [admitted(tenant) for tenant in ("loud", "two", "three", "four", "loud")] == [8, 4, 1, 1, 0]


def test_places_are_bounded_however_many_tenants_there_are() -> None:
    queue: FairQueue[Waiting] = FairQueue(2)
    for tenant in "aabc":
        queue.put(Waiting(tenant))
    for tenant in "ad":
        with pytest.raises(ServiceError) as refused:
            queue.put(Waiting(tenant))
        assert refused.value.retry_after and refused.value.metadata == {"resource": "queue", "max_waiting": "2"}
    running: Counter[str] = Counter(a=2)
    first, second = queue.admit(running, 2), queue.admit(running + Counter("b"), 2)
    assert first is not None and second is not None and (first.tenant, second.tenant) == ("b", "c")
    assert queue.admit(Counter(a=2, b=1, c=1), 2) is None
    assert [task.tenant for task in queue] == ["a", "a"]


def test_the_engine_sleeps_until_it_is_woken() -> None:
    """At rest, and while nothing but futures is waited for, the thread makes no rounds."""
    rounds: list[int] = []
    at_rest = 0
    opened: Future[None] = Future()

    def schedule(tasks: Sequence[Task], wake: Callable[[], None]) -> bool:
        nonlocal at_rest
        if not tasks:
            at_rest += 1
            return False
        rounds.append(len(tasks))
        for task in tasks:
            assert isinstance(task.op, Wait)
            if task.op.future.done():
                task.done()
                return True
            task.op.watch(wake)
        return False

    def waiting(emit: Emit) -> Steps[str]:
        yield Wait(opened)
        return "done"

    async def scene() -> None:
        engine = Engine(waiting=4, running=4, schedule=schedule)
        engine.start()
        try:
            await asyncio.sleep(0.05)
            assert rounds == [] and at_rest == 1
            ticket = engine.submit(waiting, TENANT)
            await asyncio.sleep(0.1)
            assert len(rounds) == 1
            await asyncio.to_thread(opened.set_result, None)
            assert await ticket.result() == "done"
            assert len(rounds) == 2
            # Neither a cancellation too late nor a wake-up without reason disturbs it.
            ticket.cancel()
            engine.wake()
            assert await engine.call(lambda: "called", TENANT).result() == "called"
            assert len(rounds) == 2 and at_rest <= 8
        finally:
            await asyncio.to_thread(engine.stop)

    play(scene())


def test_work_that_waits_for_a_future_is_cancelled_at_once() -> None:
    never: Future[None] = Future()
    undone = threading.Event()

    def schedule(tasks: Sequence[Task], wake: Callable[[], None]) -> bool:
        return False

    def waiting(emit: Emit) -> Steps[None]:
        try:
            yield Wait(never)
        finally:
            undone.set()

    async def scene() -> None:
        engine = Engine(waiting=4, running=4, schedule=schedule)
        engine.start()
        try:
            ticket = engine.submit(waiting, TENANT)
            await asyncio.sleep(0.05)
            ticket.cancel()
            with pytest.raises(WorkCancelled):
                await ticket.result()
            assert undone.is_set()
        finally:
            await asyncio.to_thread(engine.stop)

    play(scene())
