"""Every pair of calls on one session, in schedules that are forced step by step.

The first call gets as far as it gets in so many steps of the engine and of the journal. Then the second one comes, and
in half of the schedules the caller of the first one goes away. Then they go on, the engine first or the journal first.
Whatever comes of it is what one of the two orders gives: each call has its effect as a whole, or none and a refusal
that says why. No page is lost, and the journal holds what is listed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, permutations, product
from pathlib import Path

import pytest

from tests.server.drawing import noise
from tests.server.served import Served
from tests.server.stepping import Stepping
from vflow_client.v1 import conversations_pb2
from vflow_server.access.caller import DEFAULT_TENANT
from vflow_server.rpc.errors import ServiceError
from vflow_server.sessions import session as sessions
from vflow_server.sessions.session import Session
from vflow_server.sessions.turn import TurnRequest
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Item

FORESEEN = {"SESSION_BUSY", "SESSION_NOT_FOUND", "SESSION_DELETED"}

Log = tuple[int | str, ...]
"""A session's log, with pictures by their digests."""


@dataclass
class Scene:
    """A service, the session that calls are made on, and what came of them."""

    served: Served
    session: Session
    twins: list[Session] = field(default_factory=list)
    created: list[Session] = field(default_factory=list)

    @property
    def listed(self) -> bool:
        return self.session in list(self.served.service.sessions)


def find(scene: Scene) -> Session:
    return scene.served.service.sessions.get(DEFAULT_TENANT, scene.session.name)


async def ask(scene: Scene, text: str, request_id: str = "") -> None:
    session = find(scene)
    request = TurnRequest((text,), max_new_tokens=2, min_new_tokens=2)
    answer = await session.answer(request, accepted=time.perf_counter(), request_id=request_id, fingerprint=text)
    if not isinstance(answer, conversations_pb2.Finished):
        try:
            await session.outcome(answer)
        finally:
            answer.cancel()


async def chat(scene: Scene) -> None:
    await ask(scene, "What?")


async def chat_once(scene: Scene) -> None:
    """A turn under a request_id, which both calls may use."""
    await ask(scene, "Once?", "once")


async def add_image(scene: Scene) -> None:
    await find(scene).show(Picture(noise(30, 40), "a" * 64))


async def add_image_once(scene: Scene) -> None:
    """A picture under a request_id, which both calls may use."""
    await find(scene).show(Picture(noise(40, 30), "b" * 64), request_id="picture", fingerprint="b")


async def fork(scene: Scene) -> None:
    scene.twins.append(await scene.served.service.sessions.fork(find(scene)))


async def delete(scene: Scene) -> None:
    await scene.served.service.sessions.delete(find(scene))


async def expire(scene: Scene) -> None:
    store = scene.served.service.sessions
    if scene.listed and not scene.session.busy:
        scene.session._idle_since -= store.idle_timeout + 1
    await store.expire()


async def create(scene: Scene) -> None:
    store = scene.served.service.sessions
    scene.created.append(await store.create(DEFAULT_TENANT, scene.session.revision))


async def use_all_others(scene: Scene) -> None:
    """Use every other session that is listed, as a caller does that looks for one whose name it has lost."""
    store = scene.served.service.sessions
    own = (scene.session, *scene.twins, *scene.created)
    for session in [each for each in store if each not in own]:
        answer = await session.answer(TurnRequest(("And?",), 1), accepted=0.0)
        assert not isinstance(answer, conversations_pb2.Finished)
        await session.outcome(answer)
        await store.delete(session)


Call = Callable[[Scene], Awaitable[None]]

WRITES: tuple[Call, ...] = (chat, chat_once, add_image, add_image_once)
"""The calls that append to the session's log."""

CALLS: tuple[Call, ...] = (*WRITES, fork, delete, expire, create, use_all_others)


def log_of(items: list[Item]) -> Log:
    return tuple(item.digest if isinstance(item, CompressedImage) else item for item in items)


class Serial:
    """The logs of sessions in which the same calls came one after the other."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._logs: dict[tuple[Call, ...], Log] = {}

    async def log(self, calls: tuple[Call, ...]) -> Log:
        if calls not in self._logs:
            scene = await begin(self._served)
            for call in calls:
                await call(scene)
            self._logs[calls] = log_of(scene.session.state.sequence.log)
            await delete(scene)
        return self._logs[calls]

    async def possible(self, certain: list[Call], perhaps: list[Call]) -> set[Log]:
        """The logs that are possible after the ``certain`` calls, in any order, with any of those that may be."""
        chosen = [[*certain, *more] for count in range(len(perhaps) + 1) for more in combinations(perhaps, count)]
        return {await self.log(order) for calls in chosen for order in permutations(calls)}


async def begin(served: Served) -> Scene:
    """A session with one turn behind it."""
    service = served.service
    scene = Scene(served, await service.sessions.create(DEFAULT_TENANT, service.strategies.get("strategies/preset-25")))
    await ask(scene, "Begin")
    return scene


@dataclass(frozen=True)
class Schedule:
    """Which steps come before which.

    Attributes:
        steps: steps of the first call before the second one comes.
        leaves: whether the caller of the first call goes away then.
        engine_first: whether the engine goes on before the journal does.
        fails: number of the journal's action that fails, as on a full disk; 0: none does.
    """

    steps: int
    leaves: bool
    engine_first: bool
    fails: int = 0


async def run(
    stepping: Stepping, serial: Serial, served: Served, first: Call, second: Call, schedule: Schedule
) -> bool:
    """Run a pair of calls; returns whether the first one was under way when the second one came."""
    scene = await begin(served)
    ahead = stepping.engine if schedule.engine_first else stepping.journal
    with stepping.held():
        stepping.fails = schedule.fails
        one = asyncio.create_task(_of(first, scene))
        for _ in range(schedule.steps):
            await stepping.step(ahead)
        await stepping.settle()
        under_way = not one.done()
        if schedule.leaves:
            one.cancel()
        two = asyncio.create_task(_of(second, scene))
        while not (one.done() and two.done()) and await stepping.step(ahead):
            pass
    outcomes = dict.fromkeys((one, two))
    await asyncio.wait(outcomes, timeout=20)
    done, perhaps = list[Call](), list[Call]()
    for task, call in ((one, first), (two, second)):
        assert task.done(), f"{call.__name__} hangs"
        if task.cancelled():
            perhaps.append(call)
        elif (failure := task.exception()) is None:
            done.append(call)
        else:
            foreseen = {*FORESEEN, "STORAGE_FAILED"} if schedule.fails else FORESEEN
            assert isinstance(failure, ServiceError) and failure.reason in foreseen, repr(failure)
    if schedule.fails:
        await served.service.sessions.expire()  # deletes what the disk has not let go
    await check(serial, scene, done, perhaps)
    return under_way


async def _of(call: Call, scene: Scene) -> None:
    await call(scene)


async def check(serial: Serial, scene: Scene, done: list[Call], perhaps: list[Call]) -> None:
    """Check what the calls left, and delete it."""
    service = scene.served.service
    store = service.sessions
    while any(session.busy for session in store) or store._tasks:  # what goes on though its caller has left
        await asyncio.sleep(0.001)
    assert service.archive is not None
    rows = await asyncio.wrap_future(
        service.archive.submit(lambda connection: connection.execute("SELECT name FROM sessions").fetchall())
    )
    assert {name for (name,) in rows} == {session.name for session in store}
    if delete in done:
        assert not scene.listed
    elif delete not in perhaps and expire not in (*done, *perhaps):
        assert scene.listed
    appended = ([call for call in done if call in WRITES], [call for call in perhaps if call in WRITES])
    for session in list(store):
        log = log_of(session.state.sequence.log)
        if session is scene.session:
            assert log in await serial.possible(*appended)
        elif session in scene.twins:
            assert log in await serial.possible([], [*appended[0], *appended[1]])
        assert session.record is not None
        entries = await asyncio.wrap_future(session.record.read())
        written = entries[: session.record._entries]  # one more is there if the disk has not let it be taken back
        assert log_of([item for entry in written for item in entry.items]) == log
        assert sum(entry.images for entry in written) == session.pictures == session.state.images
        await store.delete(session)
    assert await service.engine.call(service.kv.check, DEFAULT_TENANT).result() == 0
    assert not store._incomplete and not store._leftovers


@pytest.fixture(scope="module")
def stepping() -> Iterator[Stepping]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Stepping(monkeypatch)


@pytest.fixture(scope="module")
def scheduled(stepping: Stepping, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    data: Path = tmp_path_factory.mktemp("data")
    served = Served(runtime, data=str(data))
    yield served
    served.stop()


@pytest.fixture(scope="module")
def serial(scheduled: Served) -> Serial:
    return Serial(scheduled)


@pytest.mark.parametrize("first", CALLS)
def test_two_calls_at_once_are_one_after_the_other(
    stepping: Stepping, scheduled: Served, serial: Serial, first: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few of the schedules below, for every pair."""
    for number, (second, steps) in enumerate(product(CALLS, (1, 3, 6))):
        monkeypatch.setattr(sessions, "_PATIENCE", 5.0 * (number % 2))
        schedule = Schedule(steps, leaves=bool(number // 2 % 2), engine_first=bool(number // 4 % 2))
        scheduled.run(run(stepping, serial, scheduled, first, second, schedule))


@pytest.mark.parametrize("first", CALLS)
def test_two_calls_at_once_while_the_disk_fails(
    stepping: Stepping, scheduled: Served, serial: Serial, first: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_PATIENCE", 5.0)
    for number, second in enumerate(CALLS):
        schedule = Schedule(4, bool(number % 2), engine_first=bool(number // 2 % 2), fails=1 + number % 2)
        scheduled.run(run(stepping, serial, scheduled, first, second, schedule))


@pytest.mark.long
@pytest.mark.parametrize("patience", [0.0, 5.0])
@pytest.mark.parametrize("second", CALLS)
@pytest.mark.parametrize("first", CALLS)
def test_two_calls_at_once_in_every_schedule(
    stepping: Stepping,
    scheduled: Served,
    serial: Serial,
    first: Call,
    second: Call,
    patience: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "_PATIENCE", patience)
    for leaves, engine_first, fails in product((False, True), (False, True), (False, True) if patience else (False,)):
        under_way, steps = True, 0
        while under_way:
            schedule = Schedule(steps, leaves, engine_first, fails=1 + steps % 2 if fails else 0)
            under_way = scheduled.run(run(stepping, serial, scheduled, first, second, schedule))
            steps += 1
