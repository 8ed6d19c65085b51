"""Helpers of the tests of persistence: beginning a conversation, sending turns, and listing the files on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server.served import Served
from vflow_client import (
    Client,
    Session,
)
from vflow_client.v1.conversations_pb2 import ChatRequest, Finished, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_server.store.archive import PICTURES, Archive
from vflow_server.store.folder_lock import lock_data

QUESTIONS = ("What is this?", "Why?", "And here?")


def begun(client: Client, picture: bytes) -> Session:
    """A session with a picture, before its first question."""
    session = client.session("preset-25")
    session.add_image(picture)
    return session


def answer_of(session: Session, text: str) -> str:
    return session.ask(text, max_new_tokens=8).read()


def files(data: Path) -> list[Path]:
    return sorted((data / PICTURES).iterdir())


def say(served: Served, session: Session, text: str, request_id: str, max_new_tokens: int = 8) -> Finished:
    """Send a turn with a request_id of ours."""
    request = ChatRequest(session=session.name, parts=[Part(text=text)], request_id=request_id)
    request.options.max_new_tokens = max_new_tokens
    *_, last = ConversationsStub(served.client._channel).Chat(request)
    return last.finished


@contextmanager
def archive_in(data: Path, most_bytes: int = 1 << 30) -> Iterator[Archive]:
    """The archive of a data folder, without a service."""
    lock = lock_data(data)
    try:
        archive = Archive(lock, most_bytes)
        try:
            yield archive
        finally:
            archive.close()
    finally:
        lock.close()
