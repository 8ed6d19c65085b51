"""The web backend: real HTTP in front of a real service."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn

from tests.examples.run import load
from tests.server.restartable_server import free_port
from tests.server.served import Served
from tests.server.waiting import until
from tests.vflowopt.tiny_models import SHAPES, save
from vflowopt.demo import picture_path
from vflowopt.runtime.model_runner import Runtime

CAT = (picture_path() / "cat.png").read_bytes()


class Browser:
    """Somebody's browser.

    Args:
        port: of the backend.
        user: who it is.
    """

    def __init__(self, port: int, user: str | None = "ada") -> None:
        self._port = port
        self._headers = {} if user is None else {"X-User": user}

    def send(self, method: str, path: str, body: bytes | dict[str, object] = b"") -> tuple[int, Any]:
        """The status of a response, and its JSON."""
        with self.opened(method, path, body) as response:
            text = response.read()
            return response.status, json.loads(text) if text.startswith(b"{") else None

    def ask(self, chat: str, question: str) -> list[tuple[str, dict[str, Any]]]:
        """The events of an answer."""
        with self.opened("POST", f"/chats/{chat}/turns", {"question": question}) as response:
            assert response.status == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            return list(events(response))

    @contextmanager
    def opened(
        self, method: str, path: str, body: bytes | dict[str, object] = b""
    ) -> Iterator[http.client.HTTPResponse]:
        """A response that is still to be read; leaving it closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            data = body if isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, data, self._headers)
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()


def events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-Sent Events as they come."""
    while name := response.readline().decode().strip():
        data = response.readline().decode().strip()
        assert name.startswith("event: ") and data.startswith("data: ") and response.readline() == b"\n"
        yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@contextmanager
def backend(address: str) -> Iterator[tuple[int, ModuleType]]:
    """The example in front of the service at ``address``: its port, and the module."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listening:
        patch.setenv("VFLOW_ADDRESS", address)
        module = load("chat_backend.py")
        server = uvicorn.Server(uvicorn.Config(module.app, log_config=None, lifespan="on"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive())
            yield listening.getsockname()[1], module
        finally:
            server.should_exit = True
            thread.join()


def begun(browser: Browser) -> str:
    """A chat about the cat."""
    status, answer = browser.send("POST", "/chats", CAT)
    assert status == 201
    chat: str = answer["chat"]
    return chat


def test_answers_come_as_events_and_are_counted(embedded: Served) -> None:
    with backend(embedded.address) as (port, _):
        ada, bob = Browser(port), Browser(port, "bob")
        status, answer = ada.send("POST", "/chats", CAT)
        assert (status, answer["kept_tokens"]) == (201, [170, 162, 61])
        spent = []
        for question, text in (("Which shape is green?", "arrow"), ("Where do you see the hourglass?", "center")):
            *deltas, (name, finished) = ada.ask(answer["chat"], question)
            assert {name for name, _ in deltas} == {"delta"} and "".join(data["text"] for _, data in deltas) == text
            assert (name, finished["finish_reason"]) == ("finished", "STOP")
            spent.append(finished["usage"])
        assert spent[1]["reused_tokens"] > 170, "the second turn builds on the cache of the first"
        assert ada.send("GET", "/usage") == (200, {name: spent[0].get(name, 0) + spent[1][name] for name in spent[1]})
        assert bob.send("GET", "/usage") == (200, {})
        assert ada.send("DELETE", f"/chats/{answer['chat']}") == (204, None)
        assert ada.send("DELETE", f"/chats/{answer['chat']}")[0] == 404
    assert embedded.kv_bytes() == 0


def test_a_browser_that_goes_away_cancels_its_turn(tmp_path: Path) -> None:
    runtime = Runtime.load(save(SHAPES[0], tmp_path), kv_budget=32 << 20)
    runtime.chat.stop_ids = frozenset()  # only the most tokens that it may have end an answer
    served = Served(runtime)
    try:
        with backend(served.address) as (port, module):
            ada = Browser(port)
            chat = begun(ada)
            (session,) = served.client.sessions()
            module.MAX_NEW_TOKENS = 4000
            with ada.opened("POST", f"/chats/{chat}/turns", {"question": "And?"}) as response:
                name, _ = next(events(response))
                assert name == "delta"
            # The turn ends long before its greatest length, and leaves nothing behind.
            until(lambda: not served.on_engine(lambda: served.live(served.client.attach(session.name)).busy), 30)
            assert served.client.attach(session.name).state().turn_count == 0
            assert ada.send("GET", "/usage") == (200, {})
            module.MAX_NEW_TOKENS = 3
            *_, (name, finished) = ada.ask(chat, "And now?")
            assert (name, finished["usage"]["completion_tokens"]) == ("finished", 3)
            assert ada.send("DELETE", f"/chats/{chat}") == (204, None)
        assert served.kv_bytes() == 0
    finally:
        served.stop()


def test_a_question_survives_a_restart_of_the_service(runtime: Runtime, tmp_path: Path) -> None:
    settings = {"port": str(free_port()), "data": str(tmp_path / "data")}
    served = Served(runtime, **settings)
    with backend(served.address) as (port, _):
        ada = Browser(port)
        chat = begun(ada)
        served.stop()
        answers: list[list[tuple[str, dict[str, Any]]]] = []
        asking = threading.Thread(target=lambda: answers.append(ada.ask(chat, "Which shape is green?")))
        asking.start()  # while there is no service
        served = Served(runtime, **settings)
        try:
            asking.join()
            ((delta, (name, finished)),) = answers
            assert delta == ("delta", {"text": "arrow"}) and name == "finished"
            assert ada.send("GET", "/usage") == (200, finished["usage"])
            (session,) = served.client.sessions()
            assert session.turn_count == 1
            assert ada.send("DELETE", f"/chats/{chat}") == (204, None)
            assert served.kv_bytes() == 0
        finally:
            served.stop()


def test_chats_belong_to_their_users(embedded: Served) -> None:
    with backend(embedded.address) as (port, _):
        ada = Browser(port)
        chat = begun(ada)
        question: dict[str, object] = {"question": "Which shape is green?"}
        assert Browser(port, "bob").send("POST", f"/chats/{chat}/turns", question)[0] == 404
        assert Browser(port, "bob").send("DELETE", f"/chats/{chat}")[0] == 404
        assert Browser(port, None).send("GET", "/usage")[0] == 401
        assert ada.send("DELETE", f"/chats/{chat}") == (204, None)


def test_what_is_refused_says_why(embedded: Served) -> None:
    with backend(embedded.address) as (port, _):
        ada = Browser(port)
        status, answer = ada.send("POST", "/chats", b"no picture")
        assert (status, answer["reason"]) == (400, "PICTURE_NOT_AN_IMAGE")
        assert not list(embedded.client.sessions()), "the session of the chat that did not come about is gone"
        chat = begun(ada)
        assert ada.send("POST", f"/chats/{chat}/turns", b"no json")[0] == 400
        ((name, answer),) = ada.ask(chat, "")
        assert (name, answer["reason"]) == ("failed", "EMPTY_TURN")
        assert ada.send("DELETE", f"/chats/{chat}") == (204, None)
