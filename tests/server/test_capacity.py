"""Limited capacity: KV pages, sessions, and the queue."""

import time
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.waiting import until
from vflow_client import CapacityExhausted, Session, SessionNotFound
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture(scope="session")
def cramped(model_folder: Path) -> Runtime:
    """A model with pages for two pictures at full length, or one and some text, not for more (256 tokens)."""
    runtime = Runtime.load(model_folder, kv_budget=400 << 10)
    runtime.chat.stop_ids = frozenset()
    return runtime


def converse(session: Session, turns: range) -> list[str]:
    return [session.ask(f"Question {turn}", max_new_tokens=8).read() for turn in turns]


def test_idle_sessions_make_room_and_go_on_as_if_undisturbed(serve: Serve, cramped: Runtime, runtime: Runtime) -> None:
    with serve(runtime=runtime).client.session("full") as undisturbed:
        undisturbed.add_image(png(90, 120))
        expected = converse(undisturbed, range(4))

    served = serve(runtime=cramped)
    with served.client.session("full") as session, served.client.session("full") as rival:
        session.add_image(png(90, 120))
        answers = converse(session, range(2))
        for seed in (1, 2):
            rival.add_image(png(90, 120, seed))
        given_up = session.state()
        assert not given_up.resident and given_up.kv_bytes == 0 and given_up.turn_count == 2
        third = session.ask("Question 2", max_new_tokens=8)
        answers.append(third.read())
        assert third.receipt.restored and third.usage.reused_tokens > 0
        assert not rival.state().resident
        answers += converse(session, range(3, 4))
    assert answers == expected


def test_a_conversation_too_large_for_the_pool_is_refused_and_rolled_back(serve: Serve, cramped: Runtime) -> None:
    served = serve(runtime=cramped)
    with served.client.session("full") as session:
        session.ask("Hello", max_new_tokens=2).read()
        before = session.state()
        with pytest.raises(CapacityExhausted) as refused:
            session.ask("a" * 1000, max_new_tokens=400).read()
        assert refused.value.retry_after is None and refused.value.metadata["resource"] == "kv_cache"
        assert "--kv-budget" in refused.value.message and "waiting does not help" in refused.value.message
        after = session.state()
        assert (after.turn_count, after.kv_bytes) == (1, before.kv_bytes)
        session.ask("Still there?", max_new_tokens=2).read()


def test_what_can_never_fit_is_refused_before_anybody_gives_way(serve: Serve, cramped: Runtime) -> None:
    served = serve(runtime=cramped)
    with served.client.session("full") as session, served.client.session("full") as rival:
        rival.ask("Hello", max_new_tokens=2).read()
        with pytest.raises(CapacityExhausted) as refused:
            session.ask("a" * 300, max_new_tokens=2).read()
        assert refused.value.retry_after is None
        assert int(refused.value.metadata["kv_bytes_needed"]) > int(refused.value.metadata["kv_budget"])
        assert rival.state().resident and session.state().kv_bytes == 0
        with pytest.raises(CapacityExhausted):
            session.ask("Compare", images=[png(120, 120)] * 3, max_new_tokens=2).read()
        assert rival.state().resident and session.state().image_count == 0


def test_a_conversation_held_up_by_a_running_one_waits_and_is_answered(serve: Serve, cramped: Runtime) -> None:
    served = serve(runtime=cramped)
    with served.client.session("full") as running, served.client.session("full") as rival:
        answer = running.ask("a" * 120, max_new_tokens=4000, temperature=1.0, seed=1)
        next(answer)
        rival.ask("b" * 120, max_new_tokens=4).read()
        with pytest.raises(CapacityExhausted):  # it came first and got all there is: there is no use in a retry
            answer.read()
        assert running.state().turn_count == 0 and rival.state().turn_count == 1


def test_room_for_the_pictures_of_all_sessions(serve: Serve) -> None:
    probe = serve()
    pictures = [png(60, 60, seed) for seed in range(3)]
    with probe.client.session() as session:
        session.add_image(pictures[0])
        size = probe.service.kv._images.bytes_held
    assert size > 0 and probe.service.kv._images.bytes_held == 0
    probe.stop()
    served = serve(compressed_memory=str(2 * size))
    with served.client.session() as one, served.client.session() as two, served.client.session() as three:
        one.add_image(pictures[0])
        two.ask("What?", images=[pictures[1]], max_new_tokens=1).read()
        for attempt in (
            lambda: three.add_image(pictures[2]),
            lambda: three.ask("What?", images=[pictures[2]], max_new_tokens=1).read(),
        ):
            with pytest.raises(CapacityExhausted) as refused:
                attempt()
            assert refused.value.metadata["resource"] == "session_pictures" and refused.value.retry_after
        assert three.state().image_count == 0
        three.add_image(pictures[0])  # its pages count once, for all sessions that have it
        with two.fork():
            two.delete()
            with pytest.raises(CapacityExhausted):
                one.add_image(pictures[2])
        one.add_image(pictures[2])
    assert served.service.kv._images.bytes_held == 0


def test_pictures_of_one_tenant_leave_room_for_those_of_another(serve: Serve) -> None:
    pictures = [png(60, 60, seed=seed) for seed in range(3)]
    alone = serve()
    alone.client.session().add_image(pictures[0])
    size = alone.on_engine(lambda: alone.service.kv._images.bytes_held)
    alone.stop()
    served = serve(compressed_memory=str(2 * size))
    loud = served.client.session()
    for picture in pictures[:2]:
        loud.add_image(picture)
    with served.connect(tenant="other") as client, client.session() as session:
        session.add_image(pictures[0])
        for crowded in (session, loud):
            with pytest.raises(CapacityExhausted) as refused:
                crowded.add_image(pictures[2])
            assert refused.value.metadata == {
                "resource": "session_pictures",
                "bytes": str(size),
                "max_bytes": str(2 * size),
            }
        assert session.ask("What?", max_new_tokens=1).read()


def test_places_for_sessions(serve: Serve) -> None:
    client = serve(max_sessions="2").client
    with client.session(), client.session() as second:
        with pytest.raises(CapacityExhausted) as refused:
            client.session()
        assert refused.value.metadata["resource"] == "sessions" and refused.value.retry_after
        second.delete()
        client.session().delete()


def test_places_in_the_queue(serve: Serve) -> None:
    served = serve(max_running="1", max_waiting="1")
    with served.client.session() as one, served.client.session() as two, served.client.session() as three:
        running = one.ask("Go on", max_new_tokens=4000)
        next(running)
        waiting = two.ask("Me", max_new_tokens=1)
        until(lambda: served.live(two).busy)
        with pytest.raises(CapacityExhausted) as refused:
            three.ask("Me too", max_new_tokens=1).read()
        assert refused.value.metadata["resource"] == "queue" and refused.value.retry_after
        running.close()
        waiting.read()
        three.ask("Me too", max_new_tokens=1).read()


class TestExpiry:
    """Idle sessions."""

    def test_an_idle_session_goes(self, serve: Serve, picture: bytes) -> None:
        served = serve(idle_timeout="400ms")
        session = served.client.session()
        session.add_image(picture)
        assert served.kv_bytes() > 0
        until(lambda: not list(served.service.sessions))
        until(lambda: served.kv_bytes() == 0)
        with pytest.raises(SessionNotFound):
            session.ask("Still there?").read()

    def test_reading_a_session_is_no_use_of_it(self, serve: Serve) -> None:
        served = serve(idle_timeout="400ms")
        session = served.client.session()
        begun = time.monotonic()
        with pytest.raises(SessionNotFound):
            while time.monotonic() - begun < 5:
                session.state()
                time.sleep(0.02)

    def test_a_running_turn_keeps_its_session(self, serve: Serve) -> None:
        served = serve(idle_timeout="200ms")
        with served.client.session() as session:
            answer = session.ask("Go on", max_new_tokens=4000)
            next(answer)
            time.sleep(0.6)
            state = session.state()
            assert state.expire_time.ToNanoseconds() > state.last_used_time.ToNanoseconds()
            answer.close()
