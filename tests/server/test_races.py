"""Two calls on one session at the same time, every pair of them, in an order that is forced.

The first call is held where it has got to: at the journal, or before the engine's next step. Then the second one is
sent, and both are let go. Whatever comes of it is what one of the two orders gives, or a refusal that says why; no page
is lost, and the journal holds the sessions that are listed, with what was acknowledged.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.holding import engine_held, journal_held
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import (
    DeadlineExceeded,
    Session,
    SessionBusy,
    SessionDeleted,
    SessionNotFound,
    StorageFailed,
    VFlowError,
)
from vflow_client.errors import error_from_call
from vflow_client.v1.conversations_pb2 import ChatRequest, DeleteSessionRequest, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_server.access.caller import DEFAULT_TENANT
from vflow_server.images.store import PictureStore
from vflow_server.rpc.errors import CapacityExhausted, ServiceError, storage_failed
from vflow_server.store.session_record import SessionRecord
from vflowopt.media.picture import Picture

PICTURE = png(40, 50)


@dataclass
class Ring:
    """A session, and what the calls on it made."""

    served: Served
    session: Session

    def chat(self) -> None:
        self.session.ask("What?", max_new_tokens=2, min_new_tokens=2).read()

    def retried(self) -> None:
        """A turn under a request_id that another call may use at the same time."""
        request = ChatRequest(session=self.session.name, parts=[Part(text="Once?")], request_id="once")
        request.options.max_new_tokens = 2
        try:
            list(ConversationsStub(self.served.client._channel).Chat(request, timeout=20))
        except grpc.RpcError as error:
            raise error_from_call(error) from error

    def cancel(self) -> None:
        """A turn that is cancelled at once."""
        self.session.ask("Never?", max_new_tokens=400, min_new_tokens=400).close()

    def show(self) -> None:
        self.session.add_image(PICTURE)

    def fork(self) -> None:
        self.session.fork()

    def fork_and_leave(self) -> None:
        with suppress(DeadlineExceeded):
            self.session.fork(timeout=0.02)

    def delete(self) -> None:
        self.session.delete()

    def look(self) -> None:
        self.session.state()
        list(self.served.client.sessions())

    def use_all(self) -> None:
        """Use every session that is listed, as a caller would that looks for one whose name was lost."""
        for state in list(self.served.client.sessions()):
            if state.name != self.session.name:
                with suppress(VFlowError):
                    self.served.client.attach(state.name).ask("And?", max_new_tokens=2).read()

    def delete_all_others(self) -> None:
        for state in list(self.served.client.sessions()):
            if state.name != self.session.name:
                with suppress(SessionNotFound):
                    self.served.client.attach(state.name).delete()

    def expire(self) -> None:
        """What happens when the session has been idle for too long."""
        store = self.served.service.sessions

        async def expire() -> None:
            for session in store:
                if session.name == self.session.name and not session.busy:
                    session._idle_since -= store.idle_timeout + 1
            await store.expire()

        self.served.run(expire())


CALLS: dict[str, Callable[[Ring], None]] = {
    "chat": Ring.chat,
    "retried": Ring.retried,
    "cancel": Ring.cancel,
    "show": Ring.show,
    "fork": Ring.fork,
    "fork and leave": Ring.fork_and_leave,
    "delete": Ring.delete,
    "look": Ring.look,
    "use all": Ring.use_all,
    "delete all others": Ring.delete_all_others,
    "expire": Ring.expire,
}

OFTEN = ("chat", "show", "fork", "delete", "use all", "expire")
"""Those whose pairs are tried in every run of the tests; the others are in the long one."""

FORESEEN = (SessionBusy, SessionDeleted, SessionNotFound)


HOLDS = {"journal": journal_held, "engine": engine_held}


def settle(served: Served) -> None:
    """Let the calls that were sent get as far as they can: many rounds of the event loop."""

    async def rounds() -> None:
        for _ in range(20):
            await asyncio.sleep(0.0005)

    served.run(rounds())


def stored(served: Served) -> dict[str, tuple[int, int]]:
    """The sessions in the journal, with their numbers of turns and pictures."""
    assert served.service.archive is not None
    rows = served.service.archive.submit(
        lambda connection: connection.execute(
            "SELECT name, coalesce(sum(answered), 0), coalesce(sum(images), 0) "
            "FROM sessions LEFT JOIN entries ON session = name GROUP BY name"
        ).fetchall()
    ).result(20)
    return {name: (turns, images) for name, turns, images in rows}


def run_pair(served: Served, hold: str, first: str, second: str) -> None:
    session = served.client.session("preset-25")
    session.ask("Begin", max_new_tokens=2, min_new_tokens=2).read()
    ring = Ring(served, session)
    with ThreadPoolExecutor(2) as threads:
        with ExitStack() as held:
            held.enter_context(HOLDS[hold](served))
            calls = [threads.submit(CALLS[first], ring)]
            settle(served)
            calls.append(threads.submit(CALLS[second], ring))
            settle(served)
        for name, call in zip((first, second), calls, strict=True):
            failure = call.exception(20)
            assert failure is None or isinstance(failure, FORESEEN), (name, failure)
    store = served.service.sessions
    until(lambda: not any(each.busy for each in store))
    served.kv_bytes()  # proves the integrity of the pool
    listed = {state.name: (state.turn_count, state.image_count) for state in served.client.sessions()}
    assert stored(served) == listed
    if "delete" in (first, second):
        assert session.name not in listed
    for name in listed:  # whatever is left goes on
        served.client.attach(name).ask("Still there?", max_new_tokens=1).read()
        served.client.attach(name).delete()
    assert served.kv_bytes() == 0


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("first", OFTEN)
def test_two_calls_at_once_are_one_after_the_other(serve_data: Serve, hold: str, first: str) -> None:
    served = serve_data()
    for second in OFTEN:
        run_pair(served, hold, first, second)


@pytest.mark.long
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("first", CALLS)
def test_every_pair_many_times(serve_data: Serve, hold: str, first: str) -> None:
    served = serve_data()
    for second in (*CALLS, *CALLS, *CALLS):
        run_pair(served, hold, first, second)


def test_a_session_is_not_listed_before_it_is_complete(serve_data: Serve) -> None:
    served = serve_data()
    session = served.client.session()
    with ThreadPoolExecutor(2) as threads:
        with journal_held(served):
            twin = threads.submit(session.fork)
            new = threads.submit(served.client.session)
            settle(served)
            assert [state.name for state in served.client.sessions()] == [session.name]
        names = {session.name, twin.result(20).name, new.result(20).name}
    assert {state.name for state in served.client.sessions()} == names


def test_a_session_that_is_used_again_does_not_expire(serve_data: Serve) -> None:
    """Expiry takes one session after the other; it looks at each again before it deletes it."""
    served = serve_data()
    store = served.service.sessions
    sessions = [served.client.session() for _ in range(3)]

    async def age() -> None:
        for session in sessions:
            store.get(DEFAULT_TENANT, session.name)._idle_since -= 3600

    with ThreadPoolExecutor(2) as threads:
        with journal_held(served):
            served.run(age())
            expiry = threads.submit(served.run, store.expire())
            until(lambda: store.get(DEFAULT_TENANT, sessions[0].name).deleting)  # it waits for the journal
            answer = threads.submit(lambda: sessions[2].ask("Still there?", max_new_tokens=1).read())
            until(lambda: served.live(sessions[2]).busy)
        answer.result(20)
        expiry.result(20)
    assert [state.turn_count for state in served.client.sessions()] == [1]


def test_a_session_whose_next_picture_is_being_decoded_does_not_expire(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, acquire = served.service.sessions, PictureStore.acquire
    session = served.client.session()
    reached, enough = threading.Event(), threading.Event()

    async def slow(*arguments: Any) -> Picture:
        reached.set()
        await asyncio.to_thread(enough.wait, 20)
        return await acquire(*arguments)

    monkeypatch.setattr(PictureStore, "acquire", slow)

    async def expire() -> None:
        store.get(DEFAULT_TENANT, session.name)._idle_since -= 3600
        await store.expire()

    with ThreadPoolExecutor(1) as threads:
        showing = threads.submit(session.add_image, PICTURE)
        assert reached.wait(20)
        served.run(expire())
        enough.set()
        showing.result(20)
    assert session.state().image_count == 1


def test_a_session_does_not_expire_right_after_a_call_that_needed_no_work(served: Served) -> None:
    """Such as one that is repeated, because its first answer got lost, or one that is refused."""
    store = served.service.sessions
    session = served.client.session()
    ring = Ring(served, session)
    ring.retried()
    for call in (ring.retried, lambda: session.add_image(b"no picture")):
        store.get(DEFAULT_TENANT, session.name)._idle_since -= 3600
        suppressed(call)()
        served.run(store.expire())
        assert session.state().turn_count == 1


@pytest.mark.parametrize("failure", [storage_failed("read-only"), ZeroDivisionError("a fault")], ids=["disk", "fault"])
@pytest.mark.parametrize("later", ["when sessions expire", "when the service stops"])
def test_a_record_that_the_disk_does_not_let_go_is_deleted_later(
    serve_data: Serve, monkeypatch: pytest.MonkeyPatch, later: str, failure: Exception
) -> None:
    served = serve_data()
    session, store = served.client.session(), served.service.sessions

    def fails(*arguments: object) -> None:
        raise CapacityExhausted("kv_cache", "a fork that fails when its record is there")

    def stays(record: SessionRecord) -> Future[None]:
        failed: Future[None] = Future()
        failed.set_exception(failure)
        return failed

    with monkeypatch.context() as patched:
        patched.setattr(served.service.kv, "fork", fails)
        patched.setattr(SessionRecord, "delete", stays)
        with pytest.raises(VFlowError, match="a fork that fails"):
            session.fork()
        served.run(store.expire())
        assert len(stored(served)) == 2
    if later == "when sessions expire":
        served.run(store.expire())
    else:
        served = serve_data()
    assert stored(served) == {session.name: (0, 0)}


def test_who_waits_for_a_cancelled_turn_goes_on_if_the_deletion_fails(
    serve_data: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_data()
    session = served.client.session()
    failed: Future[None] = Future()
    with ThreadPoolExecutor(2) as threads, monkeypatch.context() as patched:
        patched.setattr(SessionRecord, "delete", lambda record: failed)
        cancelled = session.ask("Never?", max_new_tokens=400, min_new_tokens=400)
        next(cancelled)
        with engine_held(served):
            cancelled.close()
            until(lambda: served.live(session)._under_way.ticket.cancelled)  # type: ignore[union-attr]
            following = threads.submit(lambda: session.ask("And now?", max_new_tokens=1).read())
            until(lambda: served.live(session).awaited)
            settle(served)
            deletion = threads.submit(session.delete)
            until(lambda: served.live(session).deleting)
        until(lambda: not served.live(session).busy)
        settle(served)
        failed.set_exception(storage_failed("read-only"))
        assert isinstance(deletion.exception(20), StorageFailed)
        following.result(20)
    assert session.state().turn_count == 1


@contextmanager
def deleted_late(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Records are deleted only when the engine has stopped and its memory would be released; yields the first call."""
    called, delete = threading.Event(), SessionRecord.delete

    def late(record: SessionRecord) -> Future[None]:
        called.set()
        deleted: Future[None] = Future()

        def wait() -> None:
            until(lambda: not served.service.engine.alive)
            time.sleep(0.2)  # in which the service would go on to the end
            deleted.set_result(delete(record).result(5))

        threading.Thread(target=wait, daemon=True).start()
        return deleted

    with monkeypatch.context() as patched:
        patched.setattr(SessionRecord, "delete", late)
        yield called


def test_a_deletion_that_is_under_way_when_the_service_stops_is_done(
    serve_data: Serve, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_data()
    gone, there = served.client.session(), served.client.session()
    for session in (gone, there):
        session.ask("Begin", images=[PICTURE], max_new_tokens=1).read()
    with deleted_late(served, monkeypatch) as called:
        deletion = ConversationsStub(served.client._channel).DeleteSession.future(DeleteSessionRequest(name=gone.name))
        assert called.wait(20)
        deletion.cancel()
        served.stop()
    kept = [path.name for path in data.rglob("vflow-kv-*")]
    assert len(kept) == 1 and there.name.rpartition("/")[2] in kept[0], "nothing is left of a session that is deleted"
    again = serve_data()
    assert [state.name for state in again.client.sessions()] == [there.name]


def test_a_session_that_comes_to_nothing_when_the_service_stops_is_not_stored(
    serve_data: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_data(grace="100ms")
    session = served.client.session()
    begun, fork = threading.Event(), SessionRecord.fork

    def slow(record: SessionRecord, origin: SessionRecord) -> Future[None]:
        fork(record, origin).result(20)
        begun.set()
        return Future()  # the caller is gone before it learns that all was done

    with ThreadPoolExecutor(1) as threads, deleted_late(served, monkeypatch), monkeypatch.context() as patched:
        patched.setattr(SessionRecord, "fork", slow)
        threads.submit(suppressed(session.fork))
        assert begun.wait(20)
        served.stop()
    assert [state.name for state in serve_data().client.sessions()] == [session.name]


def suppressed(call: Callable[[], object]) -> Callable[[], None]:
    """``call``, of which nobody minds whether it fails."""

    def calling() -> None:
        with suppress(VFlowError):
            call()

    return calling


def test_a_deletion_is_acknowledged_though_the_engine_takes_no_more_calls(serve_data: Serve) -> None:
    served = serve_data()
    session = served.client.session()
    served.service.engine.stop()
    session.delete()
    assert stored(served) == {}


def test_the_engine_refuses_work_that_should_not_have_begun(serve: Serve) -> None:
    """The event loop begins no work in a session that is deleted or busy. If it did, no page would be lost."""
    served = serve()
    session = served.client.session()
    kv, state = served.service.kv, served.live(session).state

    def twice() -> None:
        with kv.using(state):
            with pytest.raises(ServiceError, match="is being worked on"), kv.using(state):
                pass
            kv.forget(state)
            state.sequence.log.extend([1, 2, 3])
            served.service.runtime.advance([state.sequence], [3], want_logits=False)
            assert state.sequence.kv_bytes
        assert not state.sequence.kv_bytes
        with pytest.raises(ServiceError, match="was deleted"), kv.using(state):
            pass

    served.on_engine(twice)
    assert served.kv_bytes() == 0
