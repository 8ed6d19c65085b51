"""Files of the data folder that are damaged, deleted, moved or put back, at rest and under a running service."""

import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.persistence import QUESTIONS, answer_of, archive_in, begun, files, say
from tests.server.waiting import until
from vflow_client import CapacityExhausted, StorageFailed
from vflow_server.rpc.errors import ServiceError
from vflow_server.store.archive import JOURNAL, PICTURES
from vflow_server.store.files import FOLDER, bound_quarantine
from vflow_server.store.session_record import SessionFacts, SessionRecord, recover

LOG, SHARED = f"{JOURNAL}-wal", f"{JOURNAL}-shm"


def restored(data: Path, backup: Path) -> None:
    """Put the journal of ``backup`` in place of the one that is there, and nothing else."""
    for file in data.glob(f"{JOURNAL}*"):
        file.unlink()
    shutil.copy(backup / JOURNAL, data / JOURNAL)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def header(place: int, content: bytes) -> Callable[[Path], object]:
    def damage(data: Path) -> None:
        with (data / JOURNAL).open("r+b") as file:
            file.seek(place)
            file.write(content)

    return damage


def journal_without_log(data: Path) -> None:
    (data / JOURNAL).rename(data / LOG)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "16 bytes": header(0, b"\xff" * 16),
    "read-only by its header": header(18, b"\x07\x07"),
    "page size": header(16, b"\x00\x03"),
    "schema format": header(44, b"\xff\xff\xff\xff"),
    "schema below zero": header(60, b"\xff\xff\xff\xff"),
    "no application": header(68, bytes(4)),
    "emptied": lambda data: (data / JOURNAL).write_bytes(b""),
    "removed": lambda data: (data / JOURNAL).unlink(),
    "a log alone": journal_without_log,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_pictures_of_a_lost_journal_come_back_with_it(
    serve_data: Serve, data: Path, tmp_path: Path, picture: bytes, expected: list[str], damage: Callable[[Path], object]
) -> None:
    served = serve_data()
    session = begun(served.client, picture)
    answers = [answer_of(session, QUESTIONS[0])]
    served.stop()
    shutil.copytree(data, tmp_path / "backup")
    (file,) = files(data)
    damage(data)
    served = serve_data()
    assert not list(served.client.sessions()) and not files(data)
    assert [path.name.partition("-")[2] for path in (data / FOLDER).iterdir() if path.suffix == file.suffix] == [
        file.name
    ]
    other = begun(served.client, png(30, 40))
    served.stop()
    restored(data, tmp_path / "backup")
    served = serve_data()
    assert [state.name for state in served.client.sessions()] == [session.name]
    assert answers + [answer_of(served.client.attach(session.name), text) for text in QUESTIONS[1:]] == expected
    # Those of the journal in between are kept, too.
    assert len(files(data)) == 1 and len(list((data / FOLDER).glob("*.safetensors"))) == 1 and other.name


def test_an_older_journal_costs_no_newer_picture(
    serve_data: Serve, data: Path, tmp_path: Path, picture: bytes, expected: list[str]
) -> None:
    served = serve_data()
    old = begun(served.client, png(30, 40))
    served.stop()
    shutil.copytree(data, tmp_path / "older")
    served = serve_data()
    new = begun(served.client, picture)
    answers = [answer_of(new, QUESTIONS[0])]
    served.stop()
    shutil.copytree(data, tmp_path / "newer")
    restored(data, tmp_path / "older")
    served = serve_data()
    assert [state.name for state in served.client.sessions()] == [old.name] and len(files(data)) == 1
    served.stop()
    restored(data, tmp_path / "newer")
    served = serve_data()
    assert len(list(served.client.sessions())) == 2 and len(files(data)) == 2
    assert answers + [answer_of(served.client.attach(new.name), text) for text in QUESTIONS[1:]] == expected


def test_the_quarantine_has_a_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for incident in (9, 10, 11):
        for part in "ab":
            (tmp_path / f"{incident}-{part}").write_bytes(bytes(10))
    (tmp_path / "folder").mkdir()
    bound_quarantine(tmp_path, 45)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10-a", "10-b", "11-a", "11-b", "folder"]
    assert "to bound the quarantine" in capsys.readouterr().out
    bound_quarantine(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["11-a", "11-b", "folder"]
    bound_quarantine(tmp_path / "missing", 0)


def test_a_damaged_picture_goes_with_its_session(serve_data: Serve, data: Path, picture: bytes) -> None:
    session = begun(serve_data().client, picture)
    (file,) = files(data)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    client = serve_data().client
    with pytest.raises(Exception, match="SESSION_DAMAGED"):
        answer_of(client.attach(session.name), "What is this?")
    assert len(list((data / PICTURES / FOLDER).iterdir())) == 1
    client.attach(session.name).delete()
    assert not list((data / PICTURES / FOLDER).iterdir())


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(bytes(file.stat().st_size))])
def test_a_picture_that_is_shown_again_replaces_its_lost_file(
    serve_data: Serve, data: Path, picture: bytes, expected: list[str], damage: Callable[[Path], object]
) -> None:
    client = serve_data().client
    first = begun(client, picture)
    damage(files(data)[0])
    begun(client, picture)
    first = serve_data().client.attach(first.name)
    assert [answer_of(first, text) for text in QUESTIONS] == expected


def deleted(*names: str) -> Callable[[Path], object]:
    def delete(data: Path) -> None:
        for name in names:
            (data / name).unlink(missing_ok=True)

    return delete


def replaced(name: str) -> Callable[[Path], object]:
    def put_another(data: Path) -> None:
        content = (data / name).read_bytes() or b"another log"
        (data / f"{name}.other").write_bytes(content)
        (data / f"{name}.other").replace(data / name)

    return put_another


@pytest.mark.parametrize(
    "lose",
    [deleted(LOG), deleted(SHARED), deleted(LOG, SHARED), replaced(LOG), replaced(SHARED)],
    ids=["log deleted", "index deleted", "both deleted", "log replaced", "index replaced"],
)
@pytest.mark.parametrize("idle", [True, False], ids=["then idle", "then a turn"])
def test_no_turn_is_lost_with_the_log(
    serve: Serve,
    data: Path,
    tmp_path: Path,
    picture: bytes,
    expected: list[str],
    lose: Callable[[Path], object],
    idle: bool,
) -> None:
    served = serve(data=str(data))
    session = begun(served.client, picture)
    answers = [say(served, session, QUESTIONS[0], "first").text]
    assert served.service.archive is not None
    journal = served.service.archive._journal
    lose(data)
    if idle:
        until(lambda: journal._found() == journal._identities)
    answers += [say(served, session, QUESTIONS[1], "second").text]
    shutil.copytree(data, tmp_path / "killed")  # what a new process finds after kill -9
    # The service itself goes on, too.
    assert answer_of(served.client.attach(session.name), QUESTIONS[2]) == expected[2]
    assert served.client.session().fork()
    served.stop()
    again = serve(data=str(tmp_path / "killed"))
    assert say(again, session, QUESTIONS[0], "first").receipt.replayed
    assert say(again, session, QUESTIONS[1], "second").receipt.replayed
    answers.append(answer_of(again.client.attach(session.name), QUESTIONS[2]))
    assert answers == expected


def test_what_is_acknowledged_is_soon_in_the_main_file(serve: Serve, data: Path, tmp_path: Path) -> None:
    served = serve(data=str(data))
    session = served.client.session()
    answer_of(session, "What is this?")
    until(lambda: (data / LOG).stat().st_size == 0)
    (tmp_path / "killed").mkdir()
    shutil.copy(data / JOURNAL, tmp_path / "killed")
    served.stop()
    (state,) = serve(data=str(tmp_path / "killed")).client.sessions()
    assert (state.name, state.turn_count) == (session.name, 1)


@pytest.mark.parametrize("what", ["", PICTURES])
@pytest.mark.parametrize("replace", [False, True], ids=["moved", "replaced"])
def test_a_folder_that_is_moved_takes_nothing_more(
    serve: Serve, data: Path, tmp_path: Path, picture: bytes, expected: list[str], what: str, replace: bool
) -> None:
    served = serve(data=str(data))
    session = begun(served.client, picture)
    answers = [answer_of(session, QUESTIONS[0])]
    (data / what).rename(tmp_path / "elsewhere")
    if replace:
        (data / what).mkdir()
    for attempt in (lambda: answer_of(session, "Why?"), served.client.session, session.delete):
        with pytest.raises(StorageFailed, match="deleted, moved or replaced|deleted or replaced"):
            attempt()
    if not what:
        with pytest.raises(StorageFailed, match="deleted, moved or replaced"):
            served.client.strategies.create("mine", ratios=[0.5, 0.5, 0.5])
        assert not list(data.glob("*")), "nothing is written where the folder was"
    served.stop()
    if replace:
        shutil.rmtree(data / what)
    (tmp_path / "elsewhere").rename(data / what)
    again = serve(data=str(data)).client.attach(session.name)
    assert answers + [answer_of(again, text) for text in QUESTIONS[1:]] == expected


def test_a_lock_that_is_deleted_locks(serve: Serve, data: Path) -> None:
    serve(data=str(data))
    for lock in data.rglob("*.lock"):
        lock.unlink()
    with pytest.raises(OSError, match="give each its own --data"):
        serve(data=str(data))


@pytest.mark.parametrize("first", ["on", "off"])
def test_an_ephemeral_service_locks_the_folder_too(serve: Serve, data: Path, first: str) -> None:
    served = serve(data=str(data), ephemeral=first)
    for second in ("on", "off"):
        with pytest.raises(OSError, match="give each its own --data"):
            serve(data=str(data), ephemeral=second)
    served.client.strategies.create("mine", ratios=[0.5, 0.5, 0.5])
    served.stop()
    assert serve(data=str(data), ephemeral="on").client.strategies.get("mine")


def test_what_is_refused_leaves_no_file(serve_data: Serve, data: Path) -> None:
    bound = 1 << 20
    client = serve_data(data_bytes=str(bound), idle_timeout="1h").client
    seeds = iter(range(1000))

    def fill() -> None:
        session = client.session("full")
        for _ in range(200):
            session.add_image(png(60, 60, next(seeds)))

    for _ in range(3):
        with pytest.raises(CapacityExhausted) as refused:
            fill()
        assert refused.value.metadata["resource"] == "data"
        assert bytes_of(data) <= bound + (64 << 10), "the index of the log, and a page here or there, are not counted"
    with sqlite3.connect(data / JOURNAL) as connection:
        rows = {key for (key,) in connection.execute("SELECT key FROM pictures")}
    connection.close()
    assert {file.stem for file in files(data)} == rows
    for state in list(client.sessions()):
        client.attach(state.name).delete()
    assert not files(data) and not (data / FOLDER).exists()


class Uncertain(Future[None]):
    """A future whose caller ends it itself, at the worst time."""

    def set_running_or_notify_cancel(self) -> bool:
        going = super().set_running_or_notify_cancel()
        self.set_result(None)
        return going


def test_the_journal_goes_on_whatever_an_action_or_its_caller_does(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        raise SystemExit("no action may do this")

    def say_no_more(*arguments: object, **values: object) -> None:
        raise OSError("no room for the log")

    with archive_in(data) as archive:
        with pytest.raises(ServiceError, match="no action may do this"):
            archive.submit(fail).result(20)
        monkeypatch.setattr("vflow_server.store.journal.log", type("Log", (), {"error": say_no_more}))
        with pytest.raises(BaseException, match="room|syntax"):
            archive.submit(lambda connection: connection.execute("no SQL")).result(20)
        monkeypatch.setattr("vflow_server.store.journal.Future", Uncertain)
        archive.submit(lambda connection: None).result(20)
        monkeypatch.undo()
        cancelled = archive.submit(lambda connection: None)
        cancelled.cancel()
        late = archive.submit(lambda connection: 1)
        late.add_done_callback(lambda future: 1 / 0)
        assert late.result(20) == archive.submit(lambda connection: 1).result(20)
        assert archive.pulse.thread is not None and archive.pulse.thread.is_alive()


def test_what_is_lost_in_the_midst_of_a_commit_is_not_acknowledged(data: Path, tmp_path: Path) -> None:
    facts = SessionFacts("sessions/s1", 0, "red", "strategies/full", "{}", "model", 0.0)
    with archive_in(data) as archive:

        def begin_without_log(connection: sqlite3.Connection) -> None:
            SessionRecord(facts, archive)._insert(connection)
            (data / LOG).unlink()

        archive.submit(begin_without_log).result(20)
        shutil.copytree(data, tmp_path / "killed")
        with archive_in(tmp_path / "killed") as again:
            assert [found.record.facts for found in recover(again, "model")] == [facts]

        def begin_elsewhere(connection: sqlite3.Connection) -> None:
            SessionRecord(replace(facts, name="sessions/s2", number=1), archive)._insert(connection)
            (data / JOURNAL).rename(tmp_path / "moved")

        with pytest.raises(ServiceError, match="deleted or replaced"):
            archive.submit(begin_elsewhere).result(20)
