"""Turns that do not come to their end: cancelled, out of time, in each other's way, deleted under way."""

import time

import pytest

from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Answer, Client, DeadlineExceeded, Session, SessionBusy, SessionDeleted, SessionNotFound

LONG = 4000
"""More tokens than any of these tests waits for: about ten seconds' worth."""


def is_busy(served: Served, session: Session) -> bool:
    return served.live(session).busy


def ask_at_length(session: Session, **options: float) -> Answer:
    """A turn that is under way: its first piece has come."""
    answer = session.ask("Go on", max_new_tokens=LONG, **options)  # type: ignore[arg-type]
    next(answer)
    return answer


@pytest.fixture
def undisturbed(client: Client, picture: bytes) -> str:
    """The answer of a session that was only ever asked this."""
    with client.session() as session:
        session.add_image(picture)
        return session.ask("What is this?", max_new_tokens=16).read()


@pytest.mark.parametrize("how", ["cancelled", "out of time"])
def test_a_turn_without_an_end_leaves_the_session_as_it_was(
    served: Served, client: Client, picture: bytes, undisturbed: str, how: str
) -> None:
    with client.session() as session:
        session.add_image(picture)
        before = session.state()
        if how == "cancelled":
            ask_at_length(session).close()
        else:
            with pytest.raises(DeadlineExceeded):
                session.ask("Go on", max_new_tokens=LONG, timeout=0.3).read()
        until(lambda: not is_busy(served, session))
        after = session.state()
        assert (after.turn_count, after.image_count, after.kv_bytes) == (0, 1, before.kv_bytes)
        assert session.ask("What is this?", max_new_tokens=16).read() == undisturbed


def test_a_cancelled_picture_in_a_turn_is_forgotten(served: Served, client: Client, picture: bytes) -> None:
    with client.session() as session:
        answer = session.ask("Go on", images=[picture], max_new_tokens=LONG)
        next(answer)
        answer.close()
        until(lambda: not is_busy(served, session))
        assert session.state().image_count == 0 and served.kv_bytes() == 0
        assert session.add_image(picture).image == f"{session.name}/images/1"


def test_a_cancelled_turn_ends_within_a_step(served: Served, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = served.service.runtime
    step, steps = runtime.step, 0

    def slow(*arguments: object, **options: object) -> object:
        nonlocal steps
        steps += 1
        time.sleep(0.05)
        return step(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime, "step", slow)
    with client.session() as session:
        answer = ask_at_length(session)
        ticket = served.live(session)._under_way.ticket  # type: ignore[union-attr]
        answer.close()
        until(lambda: ticket.cancelled)
        at_cancel = steps
        until(lambda: not is_busy(served, session))
        assert 0 < at_cancel <= steps <= at_cancel + 1


@pytest.mark.parametrize("where", ["a turn", "a picture"])
def test_a_long_prompt_can_be_cancelled_on_the_way(
    served: Served, client: Client, picture: bytes, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    runtime, step = served.service.runtime, served.service.runtime.step
    pieces = 0

    def slow(*arguments: object, **options: object) -> object:
        nonlocal pieces
        pieces += 1
        time.sleep(0.1)
        return step(*arguments, **options)  # type: ignore[arg-type]

    with client.session("full") as session:
        session.ask("Hello", max_new_tokens=2).read()
        before = session.state()
        monkeypatch.setattr("vflow_server.engine.scheduler.PROMPT_TOKENS", 4)
        monkeypatch.setattr(runtime, "step", slow)
        with pytest.raises(DeadlineExceeded):
            if where == "a turn":
                session.ask("a" * 2000, timeout=0.6).read()
            else:
                session.add_image(picture, timeout=0.6)
        until(lambda: not is_busy(served, session))
        assert 1 < pieces < 15
        monkeypatch.setattr(runtime, "step", step)
        after = session.state()
        assert (after.turn_count, after.image_count, after.kv_bytes) == (1, 0, before.kv_bytes)
        session.ask("Still there?", max_new_tokens=2).read()


def test_a_turn_right_after_a_cancelled_one_waits_for_it(client: Client) -> None:
    with client.session() as session:
        for _ in range(5):
            ask_at_length(session).close()
            # Nothing is known yet of how far the server is with the cancellation.
            time.sleep(0.02)
            session.ask("And?", max_new_tokens=1).read()
        assert session.state().turn_count == 5


def test_two_things_at_once_in_one_session(client: Client, picture: bytes) -> None:
    with client.session() as session, client.session() as other:
        first = ask_at_length(session)
        with pytest.raises(SessionBusy) as refused:
            session.ask("Me too?").read()
        assert refused.value.metadata["session"] == session.name
        with pytest.raises(SessionBusy):
            session.add_image(picture)
        other.add_image(picture)
        other.ask("And here?", max_new_tokens=2).read()
        first.close()


def test_sessions_take_turns_on_the_engine(client: Client, picture: bytes) -> None:
    with client.session() as patient, client.session() as quick:
        answer = ask_at_length(patient)
        begun = time.monotonic()
        quick.add_image(picture)
        quick.ask("What?", max_new_tokens=3).read()
        assert time.monotonic() - begun < 5
        next(answer)
        answer.close()


def test_answers_side_by_side_are_those_given_alone(client: Client) -> None:
    def ask(session: Session) -> Answer:
        return session.ask(f"Count to {seeds[session.name]}", max_new_tokens=24)

    with client.session() as one, client.session() as two:
        seeds = {one.name: 1, two.name: 2}
        together = [ask(session) for session in (one, two)]
        texts = [answer.read() for answer in together]
    for number, text in enumerate(texts, 1):
        with client.session() as alone:
            assert alone.ask(f"Count to {number}", max_new_tokens=24).read() == text


def test_deleting_a_session_ends_its_turn(served: Served, client: Client) -> None:
    session = client.session()
    answer = ask_at_length(session)
    session.delete()
    assert served.kv_bytes() == 0
    with pytest.raises(SessionDeleted):
        answer.read()
    with pytest.raises(SessionNotFound):
        session.state()
