"""kill -9 under load: what was acknowledged is there, word for word and once, and every conversation goes on."""

import hashlib
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from tests.server.drawing import png
from tests.server.restartable_server import Parent, RestartableServer
from tests.server.served import Served
from vflow_client import Client, Session, VFlowError
from vflow_client.errors import error_from_call
from vflow_client.v1.conversations_pb2 import ChatRequest, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.images_pb2 import Image
from vflow_server.store.archive import JOURNAL, PICTURES
from vflowopt.runtime.model_runner import Runtime

R = TypeVar("R")

TALKERS = 4
TURNS = 5
TOKENS = 12


def turn_of(session: str, talker: int, turn: int) -> ChatRequest:
    """A talker's turn; its third one has a picture of its own."""
    parts = [Part(text=f"Talker {talker} asks for the {turn}th time")]
    if turn == 2:
        parts.append(Part(image=Image(data=png(40 + talker, 50))))
    request = ChatRequest(session=session, parts=parts, request_id=f"{session}-{turn}")
    request.options.max_new_tokens = request.options.min_new_tokens = TOKENS
    return request


def say(client: Client, request: ChatRequest) -> str:
    """Send a turn; its answer, once it is acknowledged."""
    try:
        *_, last = ConversationsStub(client._channel).Chat(request, timeout=20)
    except grpc.RpcError as error:
        raise error_from_call(error) from error
    assert last.HasField("finished")
    text: str = last.finished.text
    return text


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[list[str]]:
    """The answers to each talker without any kills."""
    served = Served(Runtime.load(model_folder, kv_budget=32 << 20))
    answers = []
    for talker in range(TALKERS):
        session = served.client.session("preset-25")
        session.add_image(png(60 + talker, 70))
        answers.append([say(served.client, turn_of(session.name, talker, turn)) for turn in range(TURNS)])
    served.stop()
    return answers


class Talker:
    """Holds one conversation after the other, and is not put off by deaths. Its turns carry request ids."""

    def __init__(
        self, server: RestartableServer, number: int, expected: Sequence[str], enough: threading.Event
    ) -> None:
        self._server = server
        self._number = number
        self._expected = expected
        self._enough = enough
        self.answered = 0
        self.deaths = 0
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self._enough.is_set():
                self._converse()
        except BaseException as failure:
            self.failure = failure

    def _converse(self) -> None:
        name = self._again(lambda client: client.session("preset-25").name)
        self._again(lambda client: self._show(client.attach(name)))
        answers: list[str] = []
        while len(answers) < TURNS:
            answers.append(self._again(lambda client: self._ask(client, name, answers)))
            self.answered += 1
        # Every answer that arrived is remembered, and no turn was answered twice.
        replayed = [
            self._again(lambda client, turn=turn: say(client, turn_of(name, self._number, turn)))
            for turn in range(TURNS)
        ]
        assert answers == replayed == self._expected
        state = self._again(lambda client: client.attach(name).state())
        assert (state.turn_count, state.image_count) == (TURNS, 2)

    def _show(self, session: Session) -> None:
        if not session.state().image_count:  # it may have been added before the kill that lost the response
            session.add_image(png(60 + self._number, 70))

    def _ask(self, client: Client, name: str, answers: Sequence[str]) -> str:
        # Every answer that arrived is there, and at most one turn whose answer did not arrive.
        assert client.attach(name).state().turn_count - len(answers) in (0, 1)
        return say(client, turn_of(name, self._number, len(answers)))

    def _again(self, call: Callable[[Client], R]) -> R:
        """What ``call`` returns, called anew after each death."""
        while True:
            try:
                with self._server.client() as client:
                    return call(client)
            except VFlowError as error:
                assert error.code is grpc.StatusCode.UNAVAILABLE and error.reason is None, error
                self.deaths += 1
                time.sleep(0.05)


def check_store(data: Path) -> None:
    """Nothing in the store is damaged, missing or left over."""
    with sqlite3.connect(data / JOURNAL) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert not connection.execute("PRAGMA foreign_key_check").fetchall()
        keys = {key for (key,) in connection.execute("SELECT key FROM pictures")}
        assert keys == {key for (key,) in connection.execute("SELECT DISTINCT picture FROM shown")}
    connection.close()
    files = list((data / PICTURES).iterdir())
    assert {file.stem for file in files} == keys
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.long)])
def test_killed_under_load(
    kills: int, parent: Parent, model_folder: Path, tmp_path: Path, expected: list[list[str]]
) -> None:
    moments = random.Random(kills)
    data = tmp_path / "data"
    server = RestartableServer(parent, tmp_path / "log", model=model_folder, kv_budget="4MiB", data=data)
    enough = threading.Event()
    talkers = [Talker(server, number, expected[number], enough) for number in range(TALKERS)]
    try:
        for _ in range(kills):
            time.sleep(moments.uniform(0.1, 1.2))
            server.kill()
            server.start()
        enough.set()
        for talker in talkers:
            talker.thread.join(60)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    finally:
        enough.set()
        server.close()
    for talker in talkers:
        if talker.failure is not None:
            raise talker.failure
        assert not talker.thread.is_alive()
    assert sum(talker.deaths for talker in talkers) >= kills
    assert not [line for line in server.logged() if line["level"] == "error"]
    check_store(data)
