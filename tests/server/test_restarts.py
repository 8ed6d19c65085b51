"""A graceful stop: running calls end, new calls are asked to retry, and no conversation fails."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.drawing import png
from tests.server.restartable_server import Parent, RestartableServer
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Client, Image, ServerStopping, connect
from vflow_client.v1.conversations_pb2 import AddImageRequest
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflowopt.runtime.model_runner import Runtime

QUESTIONS = ("What is this?", "Why?", "And here?")


@pytest.fixture
def server(parent: Parent, model_folder: Path, tmp_path: Path) -> Iterator[RestartableServer]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = RestartableServer(
        parent,
        tmp_path / "log",
        model=model_folder,
        kv_budget="32MiB",
        data=tmp_path / "data",
        grace="20s",
        port=port,
    )
    yield server
    server.close()


def conversation(client: Client, number: int) -> list[str]:
    """Three turns, with one picture ahead of them and one in the first."""
    with client.session("preset-25") as session:
        session.add_image(png(60, 40 + number))
        answers = [
            session.ask(text, *([] if turn else [png(40 + number, 60)]), max_new_tokens=8, min_new_tokens=8).read()
            for turn, text in enumerate(QUESTIONS)
        ]
        state = session.state()
        assert (state.turn_count, state.image_count) == (len(QUESTIONS), 2)
        return answers


def test_a_stop_ends_what_runs_and_sends_new_work_away(server: RestartableServer) -> None:
    with server.client() as client, grpc.insecure_channel(server.address) as channel:
        session = client.session()
        running = session.ask("Go on", max_new_tokens=400, min_new_tokens=400)
        next(running)
        server.signal(signal.SIGTERM)
        health = health_pb2_grpc.HealthStub(channel)
        until(lambda: health.Check(health_pb2.HealthCheckRequest()).status != health_pb2.HealthCheckResponse.SERVING)
        for new_work in (client.session, lambda: client.attach(session.name).ask("Me too?").read()):
            with pytest.raises(ServerStopping) as refused:
                new_work()
            assert refused.value.retry_after == 1
        answer = running.read()
        assert running.usage.completion_tokens == 400
        assert server.ended() == 0
    server.start()
    with server.client() as client:
        again = client.attach(session.name)
        assert again.state().turn_count == 1
        assert again.ask("And?", max_new_tokens=8).read() and answer


@pytest.mark.parametrize("down", [2.0, pytest.param(30.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_an_outage_fails_no_conversation(
    server: RestartableServer, model_folder: Path, how: signal.Signals, down: float
) -> None:
    """Clients with nothing but their defaults: two talk all the time, with pictures in their turns and ahead of them;
    one has the service generate long answers, one of which is cut off; one has been idle, and asks during the outage.
    """
    served = Served(Runtime.load(model_folder, kv_budget=32 << 20))
    expected = [conversation(served.client, number) for number in range(2)]
    long_answer = answer_at_length(served.client)
    served.stop()
    enough, failures = threading.Event(), list[Exception]()
    held, answered_at = [0, 0], list[float]()

    def talk(number: int) -> None:
        with connect(server.address) as client:
            while not enough.is_set():
                assert conversation(client, number) == expected[number]
                answered_at.append(time.monotonic())
                held[number] += 1

    def listen() -> None:
        with connect(server.address) as client:
            while not enough.is_set():
                assert answer_at_length(client) == long_answer
                answer_at_length(client, temperature=1.0)  # is continued in the same words, too

    def wake_up() -> None:
        with connect(server.address) as client, client.session("preset-25") as session:
            session.add_image(png(40, 60))
            away.wait(60)
            assert session.state().image_count == 1
            session.ask(QUESTIONS[0], max_new_tokens=8, min_new_tokens=8).read()

    def noting(act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as failure:
            failures.append(failure)

    away = threading.Event()
    acts = [lambda: talk(0), lambda: talk(1), listen, wake_up]
    talkers = [threading.Thread(target=noting, args=(act,)) for act in acts]
    for talker in talkers:
        talker.start()
    time.sleep(1.0)
    server.signal(how)
    assert server.ended() == (0 if how is signal.SIGTERM else -how)
    away.set()
    time.sleep(down)
    server.start()
    ready = time.monotonic()
    until(lambda: (sum(at > ready for at in answered_at) >= 2 and all(held)) or bool(failures), 60)
    enough.set()
    for talker in talkers:
        talker.join(60)
        assert not talker.is_alive()
    assert not failures, failures
    print(f"first answers {min(at for at in answered_at if at > ready) - ready:.1f} s after ready")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_picture_is_added_once_across_a_restart(server: RestartableServer, how: signal.Signals) -> None:
    with server.client() as client:
        name = client.session("preset-25").name
    request = AddImageRequest(session=name, image=Image(data=png(40, 60)), request_id="the same")
    with grpc.insecure_channel(server.address) as channel:
        first = ConversationsStub(channel).AddImage(request).receipt
        assert ConversationsStub(channel).AddImage(request).receipt == first
    server.signal(how)
    server.ended()
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        assert ConversationsStub(channel).AddImage(request).receipt == first
    with server.client() as client:
        session = client.attach(name)
        assert session.state().image_count == 1 and first.image == f"{name}/images/1"
        assert session.add_image(png(40, 60)).image == f"{name}/images/2"
        assert session.ask("What is this?", max_new_tokens=4).read()


def answer_at_length(client: Client, temperature: float | None = None) -> str:
    """An answer that takes a while; what is read of it does not wait for its end."""
    with client.session("preset-25") as session:
        return "".join(session.ask("Go on", max_new_tokens=400, min_new_tokens=400, temperature=temperature))
