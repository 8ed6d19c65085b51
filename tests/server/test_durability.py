"""Sessions survive the process: what is on the disk, and how a new process continues from it."""

import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.persistence import QUESTIONS, answer_of, begun, files, say
from tests.server.waiting import until
from tests.vflowopt.tiny_models import SHAPES, save
from vflow_client import (
    CapacityExhausted,
    ModelChanged,
    Session,
    SessionNotFound,
)
from vflow_server.store import journal
from vflow_server.store.archive import JOURNAL, PICTURES
from vflowopt.runtime.model_runner import Runtime


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_session_goes_on_after_a_restart(serve_data: Serve, picture: bytes, expected: list[str], turns: int) -> None:
    session = begun(serve_data().client, picture)
    answers = [answer_of(session, text) for text in QUESTIONS[:turns]]
    before = session.state()
    served = serve_data()
    (after,) = served.client.sessions()
    assert not after.resident and not after.kv_bytes
    assert (after.name, after.strategy, after.turn_count, after.image_count) == (
        session.name,
        before.strategy,
        turns,
        1,
    )
    assert after.create_time == before.create_time
    written, ended = (state.last_used_time.ToNanoseconds() for state in (after, before))
    assert before.create_time.ToNanoseconds() <= written <= ended
    assert after.expire_time.ToNanoseconds() >= before.expire_time.ToNanoseconds()
    session = served.client.attach(session.name)
    asked = session.ask(QUESTIONS[turns], max_new_tokens=8)
    answers.append(asked.read())
    if turns:
        assert asked.receipt.RestoredFrom.Name(asked.receipt.restored_from) == "DISK"
    answers += [answer_of(session, text) for text in QUESTIONS[turns + 1 :]]
    assert answers == expected
    assert session.add_image(png(40, 50)).image == f"{session.name}/images/2"
    assert served.client.session().state().create_time.ToNanoseconds() > after.create_time.ToNanoseconds()
    assert [each.name for each in served.client.sessions()][0] == session.name


def test_pictures_within_turns_stop_texts_and_forks_come_back(serve_data: Serve, picture: bytes) -> None:
    def converse(session: Session, *, end: bool) -> list[str]:
        asked = session.ask("Compare", picture, png(50, 40), max_new_tokens=8) if not end else None
        return [asked.read() if asked else "", answer_of(session, "And?")]

    served = serve_data()
    undisturbed, session = served.client.session("preset-50"), served.client.session("preset-50")
    assert converse(undisturbed, end=False) == converse(session, end=False)
    stop = answer_of(session.fork(), "So?")[2:4]
    cut = [each.ask("So?", max_new_tokens=8, stop=[stop]).read() for each in (undisturbed, session)]
    assert cut[0] == cut[1]
    twin = session.fork()
    expected = [answer_of(undisturbed, "Then?"), answer_of(undisturbed, "Well?")]
    client = serve_data().client
    for name in (session.name, twin.name):
        again = client.attach(name)
        assert [answer_of(again, "Then?"), answer_of(again, "Well?")] == expected
        assert again.state().image_count == 2
    beyond = client.attach(twin.name).fork()
    assert answer_of(beyond, "Last?") == answer_of(client.attach(session.name), "Last?")


def test_the_same_request_has_the_same_answer_once(serve_data: Serve, picture: bytes) -> None:
    served = serve_data()
    session = begun(served.client, picture)
    first = say(served, session, "What is this?", "first")
    served = serve_data()
    again = say(served, session, "What is this?", "first")
    assert again.receipt.replayed and not first.receipt.replayed
    first.receipt.replayed = True
    assert again == first
    session = served.client.attach(session.name)
    assert session.state().turn_count == 1
    say(served, session, "Why?", "second")
    served = serve_data()
    assert say(served, session, "Why?", "second").receipt.replayed
    assert served.client.attach(session.name).state().turn_count == 2


def test_a_cancelled_turn_is_gone(serve_data: Serve, picture: bytes, expected: list[str]) -> None:
    served = serve_data()
    session = begun(served.client, picture)
    answer = session.ask("Go on", max_new_tokens=2000)
    next(answer)
    answer.close()
    until(lambda: not served.live(session).busy)
    served = serve_data()
    session = served.client.attach(session.name)
    assert session.state().turn_count == 0
    assert [answer_of(session, text) for text in QUESTIONS] == expected


def test_a_turn_cancelled_while_it_is_written_is_gone(
    serve_data: Serve, picture: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_data()
    session = begun(served.client, picture)
    gate, reached = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection) -> None:
        reached.set()
        gate.wait(10)

    assert served.service.archive is not None
    held = served.service.archive.submit(slow)
    reached.wait(10)
    answer = session.ask("Never mind", max_new_tokens=2)
    assert next(answer)
    until(lambda: served.service.archive._journal._queue.qsize() == 1)  # type: ignore[union-attr]
    answer.close()
    until(lambda: not served.live(session).busy)
    gate.set()
    held.result()
    assert session.state().turn_count == 0
    served = serve_data()
    session = served.client.attach(session.name)
    assert session.state().turn_count == 0
    assert [answer_of(session, text) for text in QUESTIONS] == expected


def test_deleting_leaves_nothing(serve_data: Serve, data: Path, picture: bytes) -> None:
    served = serve_data()
    session, other = begun(served.client, picture), begun(served.client, picture)
    assert len(files(data)) == 1, "one picture, one file"
    other.add_image(png(40, 40))
    say(served, session, "What is this?", "the-needle")
    assert any(b"the-needle" in file.read_bytes() for file in data.glob(f"{JOURNAL}*"))
    session.delete()
    assert len(files(data)) == 2
    assert not any(b"the-needle" in file.read_bytes() for file in data.glob(f"{JOURNAL}*"))
    other.delete()
    assert not files(data)
    served = serve_data()
    assert not list(served.client.sessions())
    with pytest.raises(SessionNotFound):
        answer_of(served.client.attach(session.name), "Still there?")


def test_idle_sessions_expire_on_the_disk_too(serve_data: Serve, data: Path, picture: bytes) -> None:
    begun(serve_data().client, picture)
    client = serve_data(idle_timeout="200ms").client
    until(lambda: not list(client.sessions()) and not files(data))
    assert not list(serve_data().client.sessions())


def test_a_clock_that_jumps_back_changes_nothing(
    serve_data: Serve, picture: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begun(serve_data().client, picture)
    answers = [answer_of(session, QUESTIONS[0])]
    # Not for all of the process: gRPC reckons its deadlines by the same clock.
    set_back = SimpleNamespace(time=lambda: time.time() - 86_400, monotonic=time.monotonic)
    for module in ("sessions.session", "sessions.sessions", "store.session_record"):
        monkeypatch.setattr(f"vflow_server.{module}.time", set_back)
    session = serve_data().client.attach(session.name)
    answers += [answer_of(session, text) for text in QUESTIONS[1:]]
    assert answers == expected
    served = serve_data(idle_timeout="300ms")
    (state,) = served.client.sessions()
    assert state.last_used_time.ToNanoseconds() < state.create_time.ToNanoseconds()
    until(lambda: not list(served.client.sessions()))


def test_ephemeral_sessions_leave_nothing(serve_data: Serve, data: Path, picture: bytes) -> None:
    session = begun(serve_data(ephemeral="on").client, picture)
    answer_of(session, "What is this?")
    assert [path.name for path in data.iterdir()] == ["sessions.lock"]
    assert not list(serve_data().client.sessions())


def test_a_session_of_another_model_is_kept_and_says_so(
    serve_data: Serve, data: Path, picture: bytes, expected: list[str], tmp_path: Path
) -> None:
    other = Runtime.load(save(SHAPES[1], tmp_path / "other"), kv_budget=32 << 20)
    served = serve_data()
    session = begun(served.client, picture)
    finished = say(served, session, QUESTIONS[0], "once")
    served = serve_data(other, idle_timeout="100ms", max_sessions="1")
    stranded = served.client.attach(session.name)
    assert say(served, session, QUESTIONS[0], "once").text == finished.text
    for go_on in (lambda: answer_of(stranded, "Why?"), lambda: stranded.add_image(picture), stranded.fork):
        with pytest.raises(ModelChanged) as refused:
            go_on()
        assert refused.value.metadata["served"] == other.revision
    fresh = served.client.session()
    until(lambda: [each.name for each in served.client.sessions()] == [session.name])
    assert not list((data / "kv").glob("*.safetensors")), "what the other model computed is of no use"
    with pytest.raises(SessionNotFound):
        fresh.state()
    assert not stranded.state().HasField("expire_time")
    session = serve_data().client.attach(session.name)
    assert [finished.text, *(answer_of(session, text) for text in QUESTIONS[1:])] == expected


def test_what_a_crash_left_between_two_steps_is_swept(serve_data: Serve, data: Path, picture: bytes) -> None:
    session = begun(serve_data().client, picture)
    (wanted,) = files(data)
    for name in (f"{'0' * 64}.safetensors", f"{'1' * 64}.safetensors.new", f"{wanted.name}.new", "notes.txt"):
        (data / PICTURES / name).write_text("left behind")
    client = serve_data().client
    assert files(data) == sorted([wanted, data / PICTURES / "notes.txt"])
    assert answer_of(client.attach(session.name), "What is this?")


def test_two_processes_do_not_share_a_folder(serve: Serve, serve_data: Serve, data: Path) -> None:
    serve_data()
    with pytest.raises(OSError, match="give each its own --data"):
        serve(data=str(data))


@pytest.mark.parametrize("folder", ["/proc/vflow", "{file}/data"])
def test_a_folder_that_cannot_be_made_is_refused(serve: Serve, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="vflow|data"):
        serve(data=folder.format(file=tmp_path / "file"))


def test_the_folder_has_a_bound(serve_data: Serve, data: Path, picture: bytes) -> None:
    served = serve_data(data_bytes="150KiB")
    sessions: list[Session] = []
    with pytest.raises(CapacityExhausted) as refused:
        for side in range(30, 200):
            sessions.append(served.client.session("full"))
            sessions[-1].add_image(png(side, 60))
    assert refused.value.metadata["resource"] == "data" and refused.value.retry_after == 10
    for session in sessions:
        session.delete()
    begun(served.client, picture)


def test_a_migration_keeps_what_is_there_and_no_way_leads_back(
    serve_data: Serve, picture: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begun(serve_data().client, picture)
    later = (*journal._MIGRATIONS, "ALTER TABLE sessions ADD COLUMN note TEXT;")
    monkeypatch.setattr(journal, "_MIGRATIONS", later)
    served = serve_data()
    assert [answer_of(served.client.attach(session.name), text) for text in QUESTIONS] == expected
    monkeypatch.undo()
    with pytest.raises(ValueError, match="newer release"):
        serve_data()
