"""Interrupted turns: cancelled, out of time, conflicting with each other, or deleted while they run."""

import threading
import time
from typing import Any

import pytest

from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Answer, Client, DeadlineExceeded, Session, SessionBusy, SessionDeleted, SessionNotFound
from vflow_client.v1.conversations_pb2 import AddImageRequest, ChatRequest, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.images_pb2 import Image
from vflow_server.engine.engine import Ticket
from vflowopt.runtime.model_runner import Runtime

LONG = 4000
"""More tokens than any of these tests waits for: about ten seconds' worth."""


def is_busy(served: Served, session: Session) -> bool:
    return served.live(session).busy


def ticket_of(served: Served, session: Session) -> Ticket[Any, Any]:
    """The work that is under way in a session."""
    under_way = served.live(session)._under_way
    assert under_way is not None
    return under_way.ticket


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
        ticket = ticket_of(served, session)
        answer.close()
        until(lambda: ticket.cancelled)
        at_cancel = steps
        until(lambda: not is_busy(served, session))
        assert 0 < at_cancel <= steps <= at_cancel + 1


@pytest.mark.parametrize("where", ["a turn", "a picture"])
def test_a_long_prompt_can_be_cancelled_on_the_way(
    served: Served, client: Client, picture: bytes, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    step, pieces = runtime.step, 0
    on_the_way, cancelled = threading.Event(), threading.Event()

    def held(*arguments: object, **options: object) -> object:
        nonlocal pieces
        pieces += 1
        if pieces == 2:
            on_the_way.set()
            cancelled.wait(20)
        return step(*arguments, **options)  # type: ignore[arg-type]

    with client.session("full") as session:
        session.ask("Hello", max_new_tokens=2).read()
        before = session.state()
        monkeypatch.setattr("vflow_server.engine.scheduler.PROMPT_TOKENS", 4)
        monkeypatch.setattr(runtime, "step", held)
        stub = ConversationsStub(client._channel)
        call = (
            stub.Chat(ChatRequest(session=session.name, parts=[Part(text="a" * 2000)]), timeout=60)
            if where == "a turn"
            else stub.AddImage.future(AddImageRequest(session=session.name, image=Image(data=picture)), timeout=60)
        )
        assert on_the_way.wait(20)
        ticket = ticket_of(served, session)
        call.cancel()
        until(lambda: ticket.cancelled)
        cancelled.set()
        until(lambda: not is_busy(served, session))
        assert pieces == 2, "it went on after it was cancelled"
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


def test_sessions_take_turns_on_the_engine(served: Served, client: Client, picture: bytes) -> None:
    with client.session() as patient, client.session() as quick:
        answer = ask_at_length(patient)
        quick.add_image(picture)
        quick.ask("What?", max_new_tokens=3).read()
        assert is_busy(served, patient), "the quick one waited for the end of the other answer"
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
