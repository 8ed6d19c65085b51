"""A graceful stop: running calls end, new calls are asked to retry, and no conversation fails."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.drawing import png
from tests.server.restartable_server import Parent, RestartableServer
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Client, RetryPolicy, ServerStopping, VFlowError
from vflowopt.runtime.model_runner import Runtime

PATIENT = RetryPolicy(attempts=100, longest_delay=0.3)
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
    with client.session("preset-25") as session:
        return [
            session.ask(text, *([] if turn else [png(40 + number, 60)]), max_new_tokens=8, min_new_tokens=8).read()
            for turn, text in enumerate(QUESTIONS)
        ]


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


def test_conversations_with_patience_do_not_notice_restarts(server: RestartableServer, model_folder: Path) -> None:
    served = Served(Runtime.load(model_folder, kv_budget=32 << 20))
    expected = [conversation(served.client, number) for number in range(2)]
    served.stop()
    enough, failures = threading.Event(), list[VFlowError | AssertionError]()
    held = [0, 0]

    def converse(number: int) -> None:
        try:
            with server.client(PATIENT) as client:
                while not enough.is_set():
                    assert conversation(client, number) == expected[number]
                    held[number] += 1
        except (VFlowError, AssertionError) as failure:
            failures.append(failure)

    talkers = [threading.Thread(target=converse, args=(number,)) for number in range(2)]
    for talker in talkers:
        talker.start()
    for _ in range(2):
        time.sleep(0.5)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        server.start()
    enough.set()
    for talker in talkers:
        talker.join(60)
        assert not talker.is_alive()
    assert not failures, failures[0].args
    assert all(held)
