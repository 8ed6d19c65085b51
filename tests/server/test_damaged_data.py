"""Sessions when the data on the disk is damaged, or the disk is full."""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.persistence import QUESTIONS, answer_of, begun, files, say
from tests.server.served import Served
from vflow_client import (
    SessionDamaged,
    StorageFailed,
)
from vflow_server.store.archive import JOURNAL, PICTURES
from vflow_server.store.files import FOLDER


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "cut off": cut,
    "a bit flipped": flip,
    "emptied": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_picture_stops_its_sessions_alone(
    serve_data: Serve,
    data: Path,
    picture: bytes,
    expected: list[str],
    damage: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = serve_data().client
    damaged = begun(client, png(30, 40))
    (file,) = files(data)
    sound = begun(client, picture)
    answers = [answer_of(sound, QUESTIONS[0])]
    damage(file)
    client = serve_data().client
    damaged, sound = client.attach(damaged.name), client.attach(sound.name)
    for _ in range(2):
        with pytest.raises(SessionDamaged) as refused:
            answer_of(damaged, "What is this?")
        assert refused.value.metadata == {"session": damaged.name}
    assert damaged.state().image_count == 1
    assert answers + [answer_of(sound, text) for text in QUESTIONS[1:]] == expected
    assert len(list((data / PICTURES / FOLDER).glob("*"))) == (0 if damage is Path.unlink else 1)
    if damage is not Path.unlink:
        assert "set aside" in capsys.readouterr().out
    damaged.delete()
    assert [each.name for each in client.sessions()] == [sound.name]


def test_a_damaged_row_stops_its_session_alone(
    serve_data: Serve, data: Path, picture: bytes, expected: list[str]
) -> None:
    served = serve_data()
    sound, damaged = begun(served.client, picture), begun(served.client, picture)
    served.stop()
    with sqlite3.connect(data / JOURNAL) as connection:
        connection.execute("UPDATE entries SET items = replace(items, '[1', '[2') WHERE session = ?", (damaged.name,))
        connection.execute("UPDATE entries SET images = 3 WHERE session = ?", (damaged.name,))
    connection.close()
    client = serve_data().client
    with pytest.raises(SessionDamaged):
        answer_of(client.attach(damaged.name), "What is this?")
    assert [answer_of(client.attach(sound.name), text) for text in QUESTIONS] == expected


def somebody_elses(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        somebody_elses,
        lambda file: file.write_bytes(b"no database" * 1000),
        lambda file: file.write_bytes(file.read_bytes()[:5000]),
    ],
    ids=["somebody else's", "no database", "cut off"],
)
def test_a_damaged_journal_is_set_aside(
    serve_data: Serve,
    data: Path,
    picture: bytes,
    expected: list[str],
    damage: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    served = serve_data()
    begun(served.client, picture)
    served.client.strategies.create("mine", ratios=[0.5, 0.5, 0.5])
    served.stop()
    damage(data / JOURNAL)
    content = (data / JOURNAL).read_bytes()
    served = serve_data()
    assert "set aside" in capsys.readouterr().out
    assert content in [file.read_bytes() for file in (data / FOLDER).iterdir()]
    assert not list(served.client.sessions()) and served.client.strategies.get("mine")
    session = begun(served.client, picture)
    assert [answer_of(session, text) for text in QUESTIONS] == expected


def full(served: Served) -> Callable[[], object]:
    return pragma(served, "max_page_count={}", "page_count", "1000000")


def read_only(served: Served) -> Callable[[], object]:
    return pragma(served, "query_only={}", None, "OFF")


def pragma(served: Served, setting: str, now: str | None, after: str) -> Callable[[], object]:
    """Have SQLite refuse to write, as it does on a disk that is full or read-only; returns what undoes that."""
    archive = served.service.archive
    assert archive is not None

    def put(value: str | None) -> Callable[[sqlite3.Connection], None]:
        def run(connection: sqlite3.Connection) -> None:
            setting_value = value or ("ON" if now is None else connection.execute(f"PRAGMA {now}").fetchone()[0])
            connection.execute(f"PRAGMA {setting.format(setting_value)}")

        return run

    archive.submit(put(None)).result()
    return lambda: archive.submit(put(after)).result()


@pytest.mark.parametrize("trouble", [full, read_only])
def test_a_disk_that_takes_nothing_refuses_what_must_be_kept_and_no_more(
    serve_data: Serve, picture: bytes, expected: list[str], trouble: Callable[[Served], Callable[[], object]]
) -> None:
    served = serve_data()
    session = begun(served.client, picture)
    answers = [say(served, session, QUESTIONS[0], "once").text]
    over = trouble(served)
    refused: list[StorageFailed] = []
    # A full database still has room on the page that it is at.
    for _ in range(200):
        try:
            served.client.session()
        except StorageFailed as error:
            refused.append(error)
            break
    assert refused and refused[0].retry_after == 10
    if trouble is read_only:
        for attempt in (lambda: answer_of(session, "Why?"), lambda: session.add_image(png(40, 50)), session.fork):
            with pytest.raises(StorageFailed):
                attempt()
        with pytest.raises(StorageFailed):
            session.delete()
    state = session.state()
    assert (state.turn_count, state.image_count) == (1, 1)
    assert say(served, session, QUESTIONS[0], "once").text == answers[0]
    assert served.client.compress(picture).stages
    over()
    answers += [answer_of(session, text) for text in QUESTIONS[1:]]
    assert answers == expected
    again = serve_data().client.attach(session.name)
    assert again.state().turn_count == 3


def test_a_picture_that_finds_no_room_was_not_shown(
    serve_data: Serve, data: Path, picture: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_data()
    session = served.client.session("preset-25")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageFailed, match="No space left"):
            session.add_image(picture)
        with pytest.raises(StorageFailed, match="No space left"):
            session.ask("What is this?", picture, max_new_tokens=8).read()
        assert answer_of(served.client.session(), "Without a picture?")
    state = session.state()
    assert (state.turn_count, state.image_count, state.kv_bytes, files(data)) == (0, 0, 0, [])
    session.add_image(picture)
    session = serve_data().client.attach(session.name)
    assert [answer_of(session, text) for text in QUESTIONS] == expected


def test_a_journal_that_is_deleted_under_the_service_is_noticed(serve_data: Serve, data: Path, picture: bytes) -> None:
    served = serve_data()
    session = begun(served.client, picture)
    (data / JOURNAL).unlink()
    with pytest.raises(StorageFailed, match="deleted or replaced"):
        answer_of(session, "What is this?")
    (data / JOURNAL).write_bytes(b"")
    with pytest.raises(StorageFailed, match="deleted or replaced"):
        served.client.session()
    assert session.state().turn_count == 0 and served.client.compress(picture).stages
    with pytest.raises(StorageFailed):
        session.delete()
    served.stop()
