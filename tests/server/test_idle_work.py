"""Idle work: when it runs, which pages it uses, and what it costs others."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.server.engine_parts import EngineParts
from vflow_server.engine.engine import Engine, Steps, Work, WorkCancelled
from vflow_server.engine.idle_work import idle_work
from vflow_server.engine.ops import Forward, Idle, Wait
from vflow_server.engine.scheduler import IDLE_EVERY
from vflow_server.rpc.errors import CapacityExhausted
from vflow_server.tuning.proposer import Proposer
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.sequence import Sequence
from vflowopt.search.pause import Aside, Shortage

T = TypeVar("T")


@pytest.fixture
def parts(model_folder: Path) -> Iterator[EngineParts]:
    parts = EngineParts.load(model_folder, 200 << 10)
    yield parts
    parts.close()


def on(parts: EngineParts, scene: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
    """What becomes of ``scene`` on an engine of its own."""

    async def play() -> T:
        engine = Engine(waiting=4, running=1, schedule=parts.scheduler())
        engine.start()
        try:
            return await asyncio.wait_for(scene(engine), 20)
        finally:
            await asyncio.to_thread(engine.stop)

    return asyncio.run(play())


def counting(pieces: int, counted: list[int]) -> Work[object, None]:
    """Background work of so many pieces."""

    def work(emit: Callable[[object], None]) -> Steps[None]:
        for piece in range(pieces):
            yield Idle()
            counted.append(piece)

    return work


def talking(parts: EngineParts, steps: int, before: Callable[[int], None]) -> Work[object, None]:
    """Work of so many steps of the model, such as a turn; ``before`` is called before each."""

    def work(emit: Callable[[object], None]) -> Steps[None]:
        conversation = parts.runtime.start(Strategy.full())
        try:
            for step in range(steps):
                before(step)
                conversation.log.append(5)
                yield Forward(conversation)
        finally:
            conversation.release()

    return work


def test_it_gets_on_rarely_beside_conversations_and_at_once_where_there_are_none(parts: EngineParts) -> None:
    counted: list[int] = []
    beside: list[int] = []
    both_are_here = threading.Event()

    def before(step: int) -> None:
        both_are_here.wait(5)
        beside.append(len(counted))

    async def scene(engine: Engine) -> None:
        turn = engine.submit(talking(parts, 4 * IDLE_EVERY, before), "a")
        search = engine.submit(counting(1000, counted), "a", background=True)
        both_are_here.set()
        await turn.result()
        await search.result()

    on(parts, scene)
    assert 3 <= beside[-1] <= 4 and len(counted) == 1000


def test_it_takes_no_place_of_running_work_and_waits_for_none(parts: EngineParts) -> None:
    async def scene(engine: Engine) -> None:
        counted: list[int] = []
        endless = [engine.submit(counting(1 << 30, counted), "a", background=True) for _ in range(3)]
        await engine.submit(talking(parts, 3, lambda step: None), "a").result()  # running=1
        for each in endless:
            each.cancel()
            with pytest.raises(WorkCancelled):
                await each.result()

    on(parts, scene)


def test_several_take_turns(parts: EngineParts) -> None:
    order: list[str] = []

    def noting(name: str, go: threading.Event) -> Work[object, None]:
        def work(emit: Callable[[object], None]) -> Steps[None]:
            go.wait(5)
            for _ in range(4):
                yield Idle()
                order.append(name)

        return work

    async def scene(engine: Engine) -> None:
        go = threading.Event()
        tickets = [engine.submit(noting(name, go), "a", background=True) for name in "xyz"]
        go.set()
        for each in tickets:
            await each.result()

    on(parts, scene)
    assert sorted(order) == sorted("xyz" * 4)
    # From when all are there each gets on as often as the others.
    whole = "".join(order)[-9:]
    assert all(len(set(whole[place : place + 3])) == 3 for place in range(0, 9, 3)), order


def run_steps(parts: EngineParts, steps: Steps[T], between: Callable[[], None] = lambda: None) -> T:
    """Go through steps as an engine does that has nothing else to do."""
    while True:
        try:
            op = next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if isinstance(op, Wait):
            assert isinstance(op.future, Future)
            op.future.result(20)
        between()


def held(parts: EngineParts, tokens: int) -> Sequence:
    conversation = parts.runtime.start(Strategy.full())
    parts.runtime.extend(conversation, [5] * tokens)
    return conversation


def test_its_pages_are_lent_and_the_first_to_go(parts: EngineParts) -> None:
    conversations: list[Sequence] = []
    released: list[bool] = []

    def pieces() -> Generator[None, None, None]:
        conversation = held(parts, 40)
        conversations.append(conversation)
        try:
            yield None
            released.append(not conversation.resident)
            parts.runtime.extend(conversation, [6])
            yield None
        finally:
            conversations.remove(conversation)
            conversation.release()

    freed: list[bool] = []

    def take_away() -> None:
        if conversations and not freed:
            assert parts.kv.check() == conversations[0].kv_bytes > 0
            freed.append(parts.kv.release_idle())
            assert not parts.kv.release_idle(), "nothing is left to be released"

    run_steps(parts, idle_work(parts.kv, parts.encoder, pieces(), lambda: conversations, pytest.fail), take_away)
    assert freed == released == [True]


def test_it_goes_on_after_a_shortage_once_there_is_room(parts: EngineParts) -> None:
    pool = parts.runtime.pool
    live = held(parts, 100)
    waited = 0

    def pieces() -> Generator[Shortage, None, None]:
        while pool.free_pages < pool.pages:
            yield Shortage(pool.pages)

    def somebody_ends() -> None:
        nonlocal waited
        waited += 1
        if waited == 5:
            live.release()

    run_steps(parts, idle_work(parts.kv, parts.encoder, pieces(), lambda: [], pytest.fail), somebody_ends)
    assert waited == 6, "it is not asked to go on before there is room"


def test_what_can_never_have_room_is_refused_with_what_it_needs(parts: EngineParts) -> None:
    def pieces() -> Generator[None, None, None]:
        yield None
        raise PoolExhausted(1000, 0, parts.runtime.pool.pages)

    with pytest.raises(CapacityExhausted, match="KV cache"):
        run_steps(parts, idle_work(parts.kv, parts.encoder, pieces(), lambda: [], pytest.fail))


def test_pictures_are_encoded_where_pictures_are_and_proposals_made_elsewhere(parts: EngineParts) -> None:
    events: list[object] = []
    threads: list[str] = []

    def note() -> str:
        threads.append(threading.current_thread().name)
        return "done"

    def propose(work: Callable[[], Any]) -> Future[Any]:
        threads.append("elsewhere")
        future: Future[Any] = Future()
        future.set_result("proposed")
        return future

    def pieces() -> Generator[object, None, None]:
        for kind in ("encode", "propose"):
            aside = Aside(kind, note)  # type: ignore[arg-type]
            yield aside
            yield f"{kind}: {aside.run()}"

    run_steps(parts, idle_work(parts.kv, parts.encoder, pieces(), lambda: [], events.append, propose=propose))
    assert events == ["encode: done", "propose: proposed"]
    assert [name.partition("_")[0] for name in threads] == ["vflow-encoder", "elsewhere"]


def test_the_pieces_are_closed_however_it_ends(parts: EngineParts) -> None:
    closed: list[bool] = []

    def pieces() -> Generator[None, None, None]:
        try:
            while True:
                yield None
        finally:
            closed.append(True)

    steps = idle_work(parts.kv, parts.encoder, pieces(), lambda: [], pytest.fail)
    next(steps)
    next(steps)
    steps.close()
    assert closed == [True]


def test_a_proposer_is_another_process_that_ends_with_this_one() -> None:
    proposer = Proposer()
    try:
        assert proposer(partial(mul, 2, 21)).result(120) == 42
        assert proposer(os.getpid).result(20) != os.getpid()
        assert proposer(partial(os.nice, 0)).result(20) > os.nice(0)
    finally:
        proposer.close()
