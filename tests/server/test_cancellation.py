"""Cancelled work leaves nothing behind, even when others wait for its pages."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Answer, Session
from vflow_client.v1.conversations_pb2 import ChatRequest, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture(scope="module")
def cramped(model_folder: Path) -> Runtime:
    """A model with pages for 256 tokens."""
    runtime = Runtime.load(model_folder, kv_budget=400 << 10)
    runtime.chat.stop_ids = frozenset()
    return runtime


def measured(served: Served, name: str, **labels: str) -> float:
    """The service's metrics."""
    value = served.service.metrics.registry.get_sample_value(name, labels)
    assert value is not None
    return value


def ask_at_length(session: Session, text: str, tokens: int) -> Answer:
    """A turn that is under way: its first piece has come."""
    answer = session.ask(text, max_new_tokens=tokens)
    next(answer)
    return answer


@pytest.mark.parametrize("text", ["Why?", "b" * 150], ids=["short", "long"])
def test_a_turn_that_is_cancelled_after_it_gave_way_was_never_said(
    serve: Serve, cramped: Runtime, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    with serve(runtime=runtime).client.session("full") as undisturbed:
        expected = [undisturbed.ask(each, max_new_tokens=8).read() for each in ("Hello", text)]

    served, step = serve(runtime=cramped), cramped.step

    def gave_way() -> bool:
        return measured(served, "vflow_evictions_total", held_by="running") > 0

    def slow(*arguments: object, **options: object) -> object:
        if gave_way():
            time.sleep(0.02)  # so that the eldest does not end, and make room, before the other one is cancelled
        return step(*arguments, **options)  # type: ignore[arg-type]

    with served.client.session("full") as running, served.client.session("full") as session:
        answers = [session.ask("Hello", max_new_tokens=8).read()]
        monkeypatch.setattr(cramped, "step", slow)
        eldest = ask_at_length(running, "Go on", 200)
        younger = ask_at_length(session, "a" * 80, 150)
        until(gave_way)
        younger.close()
        until(lambda: not served.live(session).busy)
        eldest.close()
        assert session.state().turn_count == 1
        answers.append(session.ask(text, max_new_tokens=8).read())
    assert answers == expected


def test_sessions_that_are_deleted_while_they_answer_leave_no_pictures(serve: Serve) -> None:
    probe = serve()
    with probe.client.session("full") as session:
        session.add_image(png(60, 60))
        size = measured(probe, "vflow_picture_bytes", form="compressed")
    probe.stop()
    served = serve(compressed_memory=str(int(2.5 * size)))
    for seed in range(4):
        session = served.client.session("full")
        session.add_image(png(60, 60, seed))
        answer = ask_at_length(session, "Go on", 4000)
        session.delete()
        answer.close()


def test_a_turn_that_waits_for_one_of_a_session_that_is_deleted_never_begins(serve: Serve) -> None:
    served = serve()
    session = served.client.session()
    stub = ConversationsStub(served.client._channel)
    request = ChatRequest(session=session.name, parts=[Part(text="Go on")], request_id="the-same")
    request.options.max_new_tokens = 4000
    first = stub.Chat(request, timeout=60)
    next(first)
    second = stub.Chat(request, timeout=60)  # waits for the first, to be given the same answer
    until(lambda: measured(served, "vflow_calls_in_flight") == 2)
    session.delete()
    ends = []
    for call in (first, second):
        with pytest.raises(grpc.RpcError) as refused:
            list(call)
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in rpc_status.from_call(refused.value).details)
        ends.append(info.reason)
    assert ends == ["SESSION_DELETED", "SESSION_NOT_FOUND"]
    until(lambda: served.kv_bytes() == 0)


def test_where_pages_run_short_the_turn_that_began_last_gives_way(
    serve: Serve, cramped: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, step, all_are_here = serve(runtime=cramped), cramped.step, threading.Event()
    ended: list[int] = []

    def held(*arguments: object, **options: object) -> object:
        all_are_here.wait(20)
        return step(*arguments, **options)  # type: ignore[arg-type]

    def read(number: int, answer: Answer) -> None:
        answer.read()
        ended.append(number)

    monkeypatch.setattr(cramped, "step", held)
    with ThreadPoolExecutor(3) as threads:
        sessions = [served.client.session("full") for _ in range(3)]
        reading = []
        for number, session in enumerate(sessions):  # room for two of them, not for three
            reading.append(threads.submit(read, number, session.ask(f"Go on {number}", max_new_tokens=90)))
            until(lambda session=session: served.live(session).busy)  # type: ignore[misc]
        all_are_here.set()
        for each in reading:
            each.result(20)
    assert measured(served, "vflow_evictions_total", held_by="running") > 0
    assert ended[-1] == 2, "who came last was answered before one who came earlier"
