"""The OpenAI-compatible side, against a server that plays one."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.chat import Chat
from benchmarks.openai_system import OpenAISystem, kv_bytes_per_token
from vflowopt.demo import model_path


class Handler(BaseHTTPRequestHandler):
    """Streams "one", " two" and the usage, and remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "played"}]}).encode(), "application/json")

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.server.status != 200:
            return self._send(b"no room", "text/plain", self.server.status)
        events: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": text}}]} for text in self.server.pieces]
        events.append({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 2, "total_tokens": 32}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._send("".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream")

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.pieces = ["one", " two"]
        self.status = 200


@contextmanager
def played() -> Iterator[tuple[Server, str]]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_turn_sends_everything_again() -> None:
    with played() as (server, address):
        system = OpenAISystem("vllm", address, new_tokens=2, kv_bytes_per_token=10)
        chat = system.open(Chat(b"PNG", ("first?", "second?")))
        replies = [chat.say("first?"), chat.say("second?")]
        chat.close()
        assert (system.resident_bytes() or 0) > 1 << 20, "the server runs in this very process"
    assert [reply.text for reply in replies] == ["one two"] * 2
    assert [(reply.tokens, reply.kv_bytes) for reply in replies] == [(2, 320)] * 2
    assert all(0 < reply.first_token_s < 60 for reply in replies)
    first, second = server.asked
    url = "data:image/png;base64," + base64.b64encode(b"PNG").decode()
    assert first["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "first?"},
    ]
    assert second["messages"][0] == first["messages"][0]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == [{"type": "text", "text": "one two"}]
    for request in server.asked:
        assert request["model"] == "played" and request["stream"] is True
        assert (request["max_tokens"], request["min_tokens"], request["ignore_eos"]) == (2, 2, True)
        assert request["temperature"] == 0


def test_failures_are_told() -> None:
    with played() as (server, address):
        chat = OpenAISystem("vllm", address, new_tokens=2, kv_bytes_per_token=1).open(Chat(b"PNG", ("?",)))
        server.pieces = []
        with pytest.raises(RuntimeError, match="without any text"):
            chat.say("?")
        server.status = 503
        with pytest.raises(RuntimeError, match="503: no room"):
            chat.say("?")
        chat.close()
    with pytest.raises(RuntimeError, match="no OpenAI-compatible server answers"):
        OpenAISystem("vllm", address, new_tokens=2, kv_bytes_per_token=1)
    with pytest.raises(RuntimeError, match="give http://host:port"):
        OpenAISystem("vllm", "localhost", new_tokens=2, kv_bytes_per_token=1)


def test_bytes_of_a_token() -> None:
    config = json.loads((model_path() / "config.json").read_text())["text_config"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    expected = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head_dim * 4
    assert kv_bytes_per_token(model_path(), 4) == expected
