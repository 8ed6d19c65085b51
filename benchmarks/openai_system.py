"""Any server with the OpenAI chat API, such as vLLM: stateless to its client, which sends everything in every turn."""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import AutoConfig

from benchmarks.chat import Chat
from benchmarks.memory import listener, resident_bytes
from benchmarks.system import OpenChat, Reply, System


class OpenAISystem(System):
    """A server that runs already.

    Args:
        name: its name in tables.
        address: ``http://host:port``; the first model that it lists is used.
        new_tokens: tokens of every answer; the end of text is ignored.
        kv_bytes_per_token: bytes of a token in its KV cache, which the API does not report.

    Raises:
        RuntimeError: no server answers there as the API requires.
    """

    def __init__(self, name: str, address: str, *, new_tokens: int, kv_bytes_per_token: int) -> None:
        self.name = name
        self._host = urlsplit(address).netloc
        if not self._host:
            raise RuntimeError(f"{address!r} is no address of a server; give http://host:port")
        connection = http.client.HTTPConnection(self._host)
        try:
            connection.request("GET", "/v1/models")
            models = json.load(connection.getresponse())["data"]
            self._request = {
                "model": models[0]["id"],
                "max_tokens": new_tokens,
                # Both: no end of text within the answer, as with the other systems, and none that ends it.
                "min_tokens": new_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise RuntimeError(
                f"no OpenAI-compatible server answers at {address} ({error!r}); start it, or leave it out"
            ) from error
        finally:
            connection.close()
        self._kv_bytes_per_token = kv_bytes_per_token

    def open(self, chat: Chat) -> OpenChat:
        """Begin a chat, on a connection of its own."""
        return _OpenChat(self._host, self._request, self._kv_bytes_per_token, chat)

    def resident_bytes(self) -> int | None:
        """Memory of the server's processes, if they run on this machine."""
        process = listener(self._host)
        return None if process is None else resident_bytes(process)

    def close(self) -> None:
        """Does nothing: the server was not started here."""


class _OpenChat(OpenChat):
    def __init__(self, host: str, request: dict[str, Any], kv_bytes_per_token: int, chat: Chat) -> None:
        self._connection = http.client.HTTPConnection(host)
        self._request = request
        self._kv_bytes_per_token = kv_bytes_per_token
        url = "data:image/png;base64," + base64.b64encode(chat.picture).decode()
        self._picture: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
        self._messages: list[dict[str, Any]] = []

    def say(self, question: str) -> Reply:
        picture = [] if self._messages else self._picture
        self._messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        body = json.dumps({**self._request, "messages": self._messages})
        begun = time.perf_counter()
        first_token_s, text, usage = None, "", None
        for event in self._events(body):
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece and first_token_s is None:
                first_token_s = time.perf_counter() - begun
            text += piece or ""
            usage = event.get("usage") or usage
        if first_token_s is None or usage is None:
            raise RuntimeError("the server finished an answer without any text, or without its usage")
        self._messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        return Reply(text, usage["completion_tokens"], first_token_s, usage["total_tokens"] * self._kv_bytes_per_token)

    def close(self) -> None:
        self._connection.close()

    def _events(self, body: str) -> Iterator[dict[str, Any]]:
        """The server-sent events of one answer."""
        self._connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        if response.status != http.client.OK:
            raise RuntimeError(
                f"the server answered {response.status}: {response.read()[:500].decode(errors='replace')}"
            )
        for line in response:
            data = line.strip().removeprefix(b"data: ")
            if data and data != b"[DONE]":
                yield json.loads(data)
        response.read()  # sees the end, without which the connection takes no further request


def kv_bytes_per_token(folder: Path, itemsize: int) -> int:
    """Bytes of keys and values of one token in all layers of a model whose cache holds ``itemsize`` bytes a number."""
    text = AutoConfig.from_pretrained(folder).text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * int(text.num_key_value_heads) * int(head_dim) * itemsize
