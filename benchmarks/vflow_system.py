"""VFlow as its users meet it: a service process of its own, talked to by the Python client over gRPC."""

from __future__ import annotations

import time
from contextlib import ExitStack

import vflow_client
from benchmarks.chat import Chat
from benchmarks.memory import listener, resident_bytes
from benchmarks.service import running_service
from benchmarks.system import OpenChat, Reply, System


class VFlowSystem(System):
    """A service on the embedded model, with one strategy.

    Args:
        name: what tables call it.
        strategy: the strategy of all its sessions.
        new_tokens: tokens of every answer; the end of text is ignored.
        threads: threads of the model.
        flags: further flags of ``vflow serve``.

    Raises:
        RuntimeError: the service did not start.
    """

    def __init__(self, name: str, strategy: str, *, new_tokens: int, threads: int, flags: tuple[str, ...] = ()) -> None:
        self.name = name
        self._strategy = strategy
        self._new_tokens = new_tokens
        self._running = ExitStack()
        address = self._running.enter_context(
            running_service("--log-level", "warning", "--threads", str(threads), *flags)
        )
        self._process = listener(address)
        self._client = self._running.enter_context(vflow_client.connect(address, timeout=None))

    def open(self, chat: Chat, *, picture_ahead: bool = False) -> OpenChat:
        """Begin a chat; with ``picture_ahead`` the picture is added now, before the first question."""
        return _OpenChat(self._client.session(self._strategy), chat, self._new_tokens, picture_ahead)

    def resident_bytes(self) -> int | None:
        """Memory of the service process."""
        return None if self._process is None else resident_bytes(self._process)

    def close(self) -> None:
        """Stop the service."""
        self._running.close()


class _OpenChat(OpenChat):
    def __init__(self, session: vflow_client.Session, chat: Chat, new_tokens: int, picture_ahead: bool) -> None:
        self._session = session
        self._new_tokens = new_tokens
        self._pictures = [chat.picture]
        self._visual_kv_bytes = 0
        if picture_ahead:
            self._visual_kv_bytes = session.add_image(self._pictures.pop()).kv_bytes

    def say(self, question: str) -> Reply:
        begun = time.perf_counter()
        answer = self._session.ask(
            *self._pictures, question, max_new_tokens=self._new_tokens, min_new_tokens=self._new_tokens
        )
        first_token_s = None
        for _ in answer:
            if first_token_s is None:
                first_token_s = time.perf_counter() - begun
        if first_token_s is None:
            raise RuntimeError("the service finished an answer without any text")
        self._pictures.clear()
        self._visual_kv_bytes += sum(receipt.kv_bytes for receipt in answer.images)
        return Reply(
            answer.text,
            answer.usage.completion_tokens,
            first_token_s,
            answer.receipt.kv_bytes,
            self._visual_kv_bytes,
        )

    def close(self) -> None:
        self._session.delete()
