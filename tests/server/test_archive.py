"""What is written down together, refused, or taken back while it is written."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.persistence import QUESTIONS, answer_of, begun, files
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import CapacityExhausted


@contextmanager
def written_together(served: Served) -> Iterator[None]:
    """What is handed to the journal within is committed at the end, all of it at once."""
    archive, gate, reached = served.service.archive, threading.Event(), threading.Event()
    assert archive is not None

    def hold(connection: object) -> None:
        reached.set()
        gate.wait(20)

    held = archive.submit(hold)
    reached.wait(20)
    try:
        yield
    finally:
        gate.set()
        held.result(20)


def handed_in(served: Served) -> int:
    """How much waits for the journal."""
    assert served.service.archive is not None
    return served.service.archive._journal._handed.qsize()


def test_a_picture_that_is_deleted_and_shown_again_at_once_stays(
    serve_data: Serve, data: Path, picture: bytes, expected: list[str]
) -> None:
    served = serve_data()
    old, new = begun(served.client, picture), served.client.session("preset-25")
    with ThreadPoolExecutor(2) as threads:
        with written_together(served):
            deletion = threads.submit(old.delete)
            until(lambda: handed_in(served) == 1)
            shown = threads.submit(new.add_image, picture)
            until(lambda: handed_in(served) == 2)
        deletion.result(20)
        shown.result(20)
    assert len(files(data)) == 1
    session = serve_data().client.attach(new.name)
    assert [answer_of(session, text) for text in QUESTIONS] == expected


def test_a_turn_that_is_cancelled_in_the_midst_of_a_write_is_taken_back(
    serve_data: Serve, data: Path, picture: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_data()
    session = begun(served.client, picture)
    fsync, reached, gate = os.fsync, threading.Event(), threading.Event()

    def slow(descriptor: int) -> None:
        reached.set()
        gate.wait(20)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    answer = session.ask("And this?", images=[png(30, 40)], max_new_tokens=2)
    assert reached.wait(20)
    answer.close()
    until(lambda: not served.live(session).busy)
    gate.set()
    monkeypatch.undo()
    session = serve_data().client.attach(session.name)
    assert (session.state().turn_count, session.state().image_count) == (0, 1)
    assert [answer_of(session, text) for text in QUESTIONS] == expected
    assert len(files(data)) == 1


def test_what_was_refused_takes_no_room(serve_data: Serve) -> None:
    client = serve_data(data_bytes="200KiB").client
    seeds = iter(range(1000))

    def fill() -> int:
        """Show pictures until there is no room, and then some more; how many there was room for."""
        with client.session("full") as session:
            shown = 0
            with pytest.raises(CapacityExhausted):
                while True:
                    session.add_image(png(60, 60, next(seeds)))
                    shown += 1
            for _ in range(5):
                with pytest.raises(CapacityExhausted):
                    session.add_image(png(60, 60, next(seeds)))
            return shown

    first = fill()
    assert first > 1 and fill() == first


def test_a_fork_keeps_the_pictures_of_what_it_was_forked_from(
    serve_data: Serve, data: Path, picture: bytes, expected: list[str]
) -> None:
    client = serve_data().client
    origin = begun(client, picture)
    twin = origin.fork()
    origin.delete()
    assert len(files(data)) == 1
    twin = serve_data().client.attach(twin.name)
    assert [answer_of(twin, text) for text in QUESTIONS] == expected
    twin.delete()
    assert not files(data)
