"""ForkSession over a real channel: two sessions with a common past, each independent of the other."""

import asyncio

import pytest

from tests.server.conftest import Serve
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import CapacityExhausted, Client, Session, SessionBusy, SessionNotFound
from vflowopt.runtime.model_runner import Runtime

PAST = ("What is this?", "And what else?")
NEXT, OTHER = ("And now?", "Why?"), ("No, before that?", "Really?")


def say(session: Session, texts: tuple[str, ...]) -> list[str]:
    return [session.ask(text, max_new_tokens=10).read() for text in texts]


def begun(client: Client, picture: bytes, strategy: str | None = None) -> Session:
    """A session with the past of all these tests."""
    session = client.session(strategy)
    session.add_image(picture)
    say(session, PAST)
    return session


@pytest.fixture(scope="module")
def expected(runtime: Runtime, picture: bytes) -> dict[str, list[str]]:
    """The answers of undisturbed sessions after that past."""
    served = Served(runtime)
    answers = {}
    for name, texts in (("next", NEXT), ("other", OTHER)):
        with begun(served.client, picture) as session:
            answers[name] = say(session, texts)
    served.stop()  # before any other service holds pages of the same pool
    return answers


def pool_bytes(served: Served) -> int:
    return served.on_engine(lambda: served.service.runtime.pool.bytes_used)


def test_each_goes_on_as_if_it_were_alone(
    served: Served, client: Client, picture: bytes, expected: dict[str, list[str]]
) -> None:
    session = begun(client, picture)
    past = session.state().kv_bytes
    before = pool_bytes(served)
    twin = session.fork()
    assert pool_bytes(served) == before, "a fork by itself takes no page"
    one, other = session.state(), twin.state()
    assert other.name != one.name and other.kv_bytes == one.kv_bytes
    assert (other.strategy, other.turn_count, other.image_count) == (one.strategy, 2, 1)
    answers: list[list[str]] = [[], []]
    for texts in zip(NEXT, OTHER, strict=True):  # turn by turn, the two in each other's way if they could be
        for number, (asked, text) in enumerate(zip((session, twin), texts, strict=True)):
            answers[number] += say(asked, (text,))
    assert answers == [expected["next"], expected["other"]]
    shared = session.state().kv_bytes + twin.state().kv_bytes - pool_bytes(served)
    assert shared > past // 2, "all of the past but what lies on its last pages is held once"
    # A picture shown later belongs to one of them, and is counted on from those shown before.
    assert twin.add_image(picture).image == f"{twin.name}/images/2"
    assert (session.state().image_count, twin.state().image_count) == (1, 2)
    served.kv_bytes()  # proves the integrity of the pool
    session.delete()
    twin.delete()
    assert served.kv_bytes() == 0


@pytest.mark.parametrize("first", ["the first", "the second"])
def test_deleting_one_leaves_the_other_whole(
    served: Served, client: Client, picture: bytes, expected: dict[str, list[str]], first: str
) -> None:
    session = begun(client, picture)
    twin = session.fork()
    gone, left = (session, twin) if first == "the first" else (twin, session)
    gone.delete()
    assert say(left, NEXT) == expected["next"]
    with pytest.raises(SessionNotFound):
        gone.state()
    left.delete()
    assert served.kv_bytes() == 0


def test_a_picture_shown_ahead_is_in_both(client: Client, picture: bytes) -> None:
    with client.session() as undisturbed, client.session() as session:
        undisturbed.add_image(picture)
        session.add_image(picture)
        with session.fork() as twin, twin.fork() as third:
            expected = say(undisturbed, PAST)
            assert [say(each, PAST) for each in (third, session, twin)] == [expected] * 3


def test_a_new_session_can_be_forked(client: Client) -> None:
    with client.session("full") as session, session.fork() as twin:
        assert twin.state().strategy == "strategies/full"
        assert say(twin, PAST) == say(session, PAST)


@pytest.mark.parametrize("offload_memory", ["1GiB", "1"], ids=["parked", "only the log is left"])
def test_what_has_made_room_for_others_can_be_forked(
    serve: Serve, picture: bytes, expected: dict[str, list[str]], offload_memory: str
) -> None:
    served = serve(offload_memory=offload_memory)
    session = begun(served.client, picture)
    put_aside(served)
    assert not session.state().resident
    twin = session.fork()
    assert not twin.state().resident and twin.state().turn_count == 2
    assert say(twin, OTHER) == expected["other"]
    first = session.ask(NEXT[0], max_new_tokens=10)
    assert [first.read(), *say(session, NEXT[1:])] == expected["next"]
    assert first.receipt.restored
    session.delete()
    twin.delete()


def put_aside(served: Served) -> None:
    """Offload every idle session."""

    def release() -> None:
        while served.service.kv.release_idle():
            pass

    served.on_engine(release)


def test_a_running_turn_is_in_the_way_and_request_ids_are_not_inherited(served: Served, client: Client) -> None:
    with client.session() as session:
        answer = session.ask("Go on", max_new_tokens=4000)
        next(answer)
        with pytest.raises(SessionBusy):
            session.fork()
        assert len(list(client.sessions())) == 1, "nothing is left of the attempt"
        answer.close()
        until(lambda: not served.live(session).busy)
        session.fork().delete()


def test_a_fork_takes_a_place(serve: Serve) -> None:
    client = serve(max_sessions="2").client
    with client.session() as session, session.fork():
        with pytest.raises(CapacityExhausted) as refused:
            session.fork()
        assert refused.value.metadata["resource"] == "sessions" and refused.value.retry_after


def test_a_caller_that_leaves_leaves_nothing_behind(served: Served) -> None:
    with served.client.session() as session:
        say(session, PAST[:1])
        used = pool_bytes(served)
        store = served.service.sessions

        async def leave(steps: int) -> None:
            forking = asyncio.create_task(store.fork(served.live(session)))
            for _ in range(steps):
                await asyncio.sleep(0)
            forking.cancel()
            await asyncio.wait([forking])
            if not forking.cancelled():  # it was done before
                await store.delete(forking.result())

        for steps in range(8):
            served.run(leave(steps))
        assert [living.name for living in store] == [session.name]
        until(lambda: pool_bytes(served) == used)
        assert served.kv_bytes() == session.state().kv_bytes
