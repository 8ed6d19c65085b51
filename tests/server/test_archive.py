"""Writes of the archive: those committed together, those refused, and those rolled back."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.persistence import QUESTIONS, answer_of, archive_in, begun, files
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import CapacityExhausted, SessionDamaged, SessionDeleted, StorageFailed
from vflow_client.v1.conversations_pb2 import Finished
from vflow_server.rpc.errors import ServiceError
from vflow_server.store.answers import REMEMBERED, StoredAnswer
from vflow_server.store.archive import JOURNAL
from vflow_server.store.files import FOLDER
from vflow_server.store.session_record import Entry, SessionFacts, SessionRecord


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
    """The number of entries that wait for the journal."""
    assert served.service.archive is not None
    return served.service.archive._journal._queue.qsize()


def test_one_tenant_that_fills_the_folder_leaves_the_last_part_to_others(serve_data: Serve) -> None:
    served = serve_data(data_bytes="400KiB")
    with served.connect(tenant="quiet") as client:
        begun, loud = client.session(), served.client.session("full")
        for much in (lambda seed: loud.add_image(png(90, 90, seed)), lambda seed: served.client.session()):
            with pytest.raises(CapacityExhausted) as refused:
                for seed in range(1000):
                    much(seed)
            assert refused.value.metadata == {"resource": "data", "max_bytes": str(400 << 10)}
        for session in (begun, client.session()):
            assert answer_of(session, QUESTIONS[0])


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


def test_a_picture_comes_back_after_its_last_session_was_deleted(
    serve_data: Serve, data: Path, picture: bytes, expected: list[str]
) -> None:
    client = serve_data().client
    begun(client, picture).delete()
    assert not files(data)
    session = begun(client, picture)  # its compressed form was still cached: only the file is made anew
    session = serve_data().client.attach(session.name)
    assert [answer_of(session, text) for text in QUESTIONS] == expected


def test_a_turn_that_ends_after_its_session_was_deleted_is_told_so(serve_data: Serve) -> None:
    served = serve_data()
    session = served.client.session()
    with ThreadPoolExecutor(1) as threads:
        with written_together(served):
            answer = session.ask("What is this?", max_new_tokens=200, min_new_tokens=200)
            next(answer)
            deletion = threads.submit(session.delete)
            until(lambda: handed_in(served) == 2)  # the deletion, and then the turn
        with pytest.raises(SessionDeleted):
            answer.read()
        deletion.result(20)
    assert not list(serve_data().client.sessions())


def test_a_session_that_was_deleted_is_not_copied(serve_data: Serve) -> None:
    """Its copy would have no entries, though the session that was made of it would know all turns."""
    served = serve_data()
    session = served.client.session()
    answer_of(session, QUESTIONS[0])
    record, archive = served.live(session).record, served.service.archive
    assert record is not None and archive is not None
    twin = SessionRecord(replace(record.facts, name="sessions/twin", number=99), archive)
    with written_together(served):
        deletion, copy = record.delete(), twin.fork(record)
    deletion.result(20)
    with pytest.raises(ServiceError) as refused:
        copy.result(20)
    assert refused.value.reason == "SESSION_DELETED"
    assert not archive.submit(lambda connection: connection.execute("SELECT * FROM sessions").fetchall()).result(20)


def test_an_entry_that_is_missing_is_noticed(serve_data: Serve, data: Path, picture: bytes) -> None:
    served = serve_data()
    session = begun(served.client, picture)
    for text in QUESTIONS:
        answer_of(session, text)
    served.stop()
    with sqlite3.connect(data / JOURNAL) as connection:
        assert connection.execute("DELETE FROM entries WHERE number = 2").rowcount == 1
    connection.close()
    session = serve_data().client.attach(session.name)
    with pytest.raises(SessionDamaged, match="entry 2 is missing"):
        answer_of(session, "Still there?")


def test_a_damaged_page_is_noticed_before_it_is_read(serve_data: Serve, data: Path) -> None:
    served = serve_data()
    session = served.client.session()
    served.stop()
    with sqlite3.connect(data / JOURNAL) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'answers'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    content = bytearray((data / JOURNAL).read_bytes())
    content[(page - 1) * size : page * size] = b"\xff" * size
    (data / JOURNAL).write_bytes(content)
    served = serve_data()
    assert not list(served.client.sessions())
    assert any(path.name.endswith(JOURNAL) for path in (data / FOLDER).iterdir())
    assert served.client.session().name != session.name


def test_a_record_that_was_deleted_takes_nothing_more(data: Path) -> None:
    with archive_in(data) as archive:
        record = SessionRecord(SessionFacts("sessions/s1", 0, "red", "strategies/full", "{}", "model", 0.0), archive)
        record.begin().result(20)
        record.delete().result(20)
        with pytest.raises(ServiceError) as refused:
            record.write(Entry((1, 2, 3), 0, answered=True)).result(20)
        assert refused.value.reason == "SESSION_DELETED"


def test_answers_that_are_forgotten_are_forgotten_on_the_disk(data: Path) -> None:
    with archive_in(data) as archive:
        record = SessionRecord(SessionFacts("sessions/s1", 0, "red", "strategies/full", "{}", "model", 0.0), archive)
        record.begin().result(20)
        for number in range(REMEMBERED + 3):
            answer = StoredAnswer(f"id-{number}", "print", Finished(text=str(number)))
            record.write(Entry((number,), 0, answered=True), answer).result(20)
            record.commit()
        kept = [answer.request_id for answer in record.answers().result(20)]
        assert kept == [f"id-{number}" for number in range(3, REMEMBERED + 3)]


def test_a_session_that_cannot_be_written_down_does_not_live(serve_data: Serve, data: Path) -> None:
    served = serve_data(max_sessions="1")
    (data / JOURNAL).unlink()
    for _ in range(2):  # nor does it take the place of another
        with pytest.raises(StorageFailed):
            served.client.session()
    assert not list(served.client.sessions())
