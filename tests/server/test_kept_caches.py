"""KV caches survive a stop in files, and are restored only for the log that they were computed from."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.persistence import QUESTIONS, answer_of, begun
from tests.server.restartable_server import Parent, RestartableServer
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Client, Session
from vflow_server.store.archive import JOURNAL
from vflow_server.store.files import FOLDER
from vflowopt.runtime.offload import OffloadedCache

NOTHING = "RESTORED_FROM_UNSPECIFIED"


@pytest.fixture
def kv(data: Path) -> Path:
    return data / "kv"


def caches(kv: Path) -> list[Path]:
    return sorted(kv.glob("*.safetensors"))


def restored_from(session: Session, text: str, expected: str) -> str:
    """Ask, and have the expected answer; says from where the cache came back for it."""
    answer = session.ask(text, max_new_tokens=8)
    assert answer.read() == expected
    return answer.receipt.RestoredFrom.Name(answer.receipt.restored_from)


def asked_once(client: Client, picture: bytes, expected: list[str]) -> Session:
    session = begun(client, picture)
    assert answer_of(session, QUESTIONS[0]) == expected[0]
    return session


class TestAProcess:
    @pytest.fixture
    def server(self, parent: Parent, model_folder: Path, tmp_path: Path, data: Path) -> Iterator[RestartableServer]:
        server = RestartableServer(
            parent, tmp_path / "log", model=model_folder, kv_budget="32MiB", data=data, grace="20s"
        )
        yield server
        server.close()

    def test_that_is_stopped_leaves_them_and_one_that_is_killed_none(
        self, server: RestartableServer, kv: Path, picture: bytes, expected: list[str]
    ) -> None:
        with server.client() as client:
            went_on, waits = (asked_once(client, picture, expected).name for _ in range(2))
        server.signal(signal.SIGTERM)
        assert server.ended() == 0 and len(caches(kv)) == 2
        server.start()
        with server.client() as client:
            assert restored_from(client.attach(went_on), QUESTIONS[1], expected[1]) == "DISK"
        until(lambda: len(caches(kv)) == 1)
        server.kill()
        server.start()
        with server.client() as client:
            # The session that went on lost what was in memory; nothing happened to the other.
            assert restored_from(client.attach(went_on), QUESTIONS[2], expected[2]) == "LOG"
            assert restored_from(client.attach(waits), QUESTIONS[1], expected[1]) == "DISK"
            assert restored_from(client.attach(waits), QUESTIONS[2], expected[2]) == NOTHING


@pytest.mark.parametrize("memory", ["32MiB", "1"], ids=["memory", "disk"])
def test_those_that_had_made_room_are_kept_as_well(
    serve_data: Serve, kv: Path, picture: bytes, expected: list[str], memory: str
) -> None:
    served = serve_data(offload_memory=memory)
    session = asked_once(served.client, picture, expected)
    served.on_engine(served.service.kv.release_idle)  # the prefix
    served.on_engine(served.service.kv.release_idle)
    assert not session.state().resident
    session = serve_data().client.attach(session.name)
    assert restored_from(session, QUESTIONS[1], expected[1]) == "DISK"
    until(lambda: not caches(kv))


def test_one_that_nobody_asks_for_is_kept_again_and_a_fork_gets_it(
    serve_data: Serve, kv: Path, picture: bytes, expected: list[str]
) -> None:
    session = asked_once(serve_data().client, picture, expected)
    for _ in range(2):
        client = serve_data().client
        assert not client.attach(session.name).state().resident and len(caches(kv)) == 1
    session = client.attach(session.name)
    twin = session.fork()
    tiers = [restored_from(each, QUESTIONS[1], expected[1]) for each in (twin, session)]
    assert tiers == ["HOST_MEMORY", "DISK"], "it was read for the fork"


def test_a_cancelled_turn_leaves_what_came_back_for_it(serve_data: Serve, picture: bytes, expected: list[str]) -> None:
    session = asked_once(serve_data().client, picture, expected)
    served = serve_data()
    session = served.client.attach(session.name)
    answer = session.ask("Well?", max_new_tokens=4000)
    next(answer)
    answer.close()
    until(lambda: not served.live(session).busy)
    assert restored_from(session, QUESTIONS[1], expected[1]) == NOTHING


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


def foreign(file: Path) -> None:
    file.write_bytes(b"somebody else's")


@pytest.mark.parametrize("damage", [cut, flip, foreign])
def test_a_damaged_one_is_deleted_and_computed_anew(
    serve_data: Serve,
    kv: Path,
    picture: bytes,
    expected: list[str],
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    served = serve_data()
    session = asked_once(served.client, picture, expected)
    served.stop()
    (file,) = caches(kv)
    damage(file)
    session = serve_data().client.attach(session.name)
    assert restored_from(session, QUESTIONS[1], expected[1]) == "LOG"
    assert not caches(kv) and not (kv / FOLDER).exists()
    assert "was deleted" in capsys.readouterr().out


def swapped(files: list[Path]) -> None:
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, reversed(contents), strict=True):
        file.write_bytes(content)


def exchanged(files: list[Path]) -> None:
    """Each gets the session of the other."""
    names = [file.name.split("-") for file in files]
    parts = [(one[:3], other[3:4], one[4:]) for one, other in zip(names, reversed(names), strict=True)]
    for file, (head, session, tail) in zip(files, parts, strict=True):
        file.rename(file.with_name("-".join([*head, *session, *tail])))


def of_another_release(files: list[Path]) -> None:
    for file in files:
        file.rename(file.with_name(file.name.replace("-v1-", "-v2-")))


def gone(files: list[Path]) -> None:
    for file in files:
        file.unlink()


@pytest.mark.parametrize("mistake", [swapped, exchanged, of_another_release, gone])
def test_none_is_taken_for_another(
    serve_data: Serve, kv: Path, picture: bytes, expected: list[str], mistake: Callable[[list[Path]], None]
) -> None:
    served = serve_data()
    sessions = [asked_once(served.client, picture, expected), served.client.session("preset-25")]
    answer_of(sessions[1], "What else?")
    with sessions[1].fork() as undisturbed:
        answers = [expected[1], answer_of(undisturbed, QUESTIONS[1])]
    served.stop()
    mistake(caches(kv))
    client = serve_data().client
    for session, answer in zip(sessions, answers, strict=True):
        assert restored_from(client.attach(session.name), QUESTIONS[1], answer) == "LOG"
    assert not caches(kv)


def test_an_older_journal_does_not_get_what_was_computed_later(
    serve_data: Serve, data: Path, kv: Path, picture: bytes, expected: list[str], tmp_path: Path
) -> None:
    served = serve_data()
    session = asked_once(served.client, picture, expected)
    served.stop()
    shutil.copy(data / JOURNAL, tmp_path / JOURNAL)
    served = serve_data()
    answer_of(served.client.attach(session.name), "What else is there to be seen?")
    served.stop()
    shutil.copy(tmp_path / JOURNAL, data / JOURNAL)
    session = serve_data().client.attach(session.name)
    assert session.state().turn_count == 1
    assert restored_from(session, QUESTIONS[1], expected[1]) == "LOG"


def test_older_caches_are_a_beginning_of_what_was_said_since(
    serve_data: Serve, kv: Path, picture: bytes, expected: list[str], tmp_path: Path
) -> None:
    served = serve_data()
    session = asked_once(served.client, picture, expected)
    served.stop()
    shutil.copytree(kv, tmp_path / "older")
    served = serve_data()
    assert answer_of(served.client.attach(session.name), QUESTIONS[1]) == expected[1]
    served.stop()
    shutil.rmtree(kv)
    shutil.copytree(tmp_path / "older", kv)
    session = serve_data().client.attach(session.name)
    assert restored_from(session, QUESTIONS[2], expected[2]) == "DISK"


def test_a_deleted_session_leaves_no_file(
    serve_data: Serve, kv: Path, picture: bytes, expected: list[str], tmp_path: Path
) -> None:
    served = serve_data()
    session, other = (asked_once(served.client, picture, expected) for _ in range(2))
    served.stop()
    shutil.copytree(kv, tmp_path / "left behind")
    served = serve_data()
    served.client.attach(session.name).delete()
    until(lambda: len(caches(kv)) == 1)
    served.stop()
    # As if the process had died before the file was gone.
    shutil.copytree(tmp_path / "left behind", kv, dirs_exist_ok=True)
    client = serve_data().client
    assert len(caches(kv)) == 1
    assert restored_from(client.attach(other.name), QUESTIONS[1], expected[1]) == "DISK"


def test_an_expired_session_leaves_no_file(serve_data: Serve, kv: Path, picture: bytes, expected: list[str]) -> None:
    served = serve_data()
    asked_once(served.client, picture, expected)
    served.stop()
    assert len(caches(kv)) == 1
    client = serve_data(idle_timeout="200ms").client
    until(lambda: not list(client.sessions()) and not caches(kv))


def bound_that_leaves(served: Served, room: int) -> int:
    """The bound on the data folder with which ``room`` bytes are left for caches, as long as it is a small folder."""
    archive = served.service.archive
    assert archive is not None
    content = served.service.settings.data_bytes - archive.room - archive._log_bytes
    return (content + room) * 8 // 7  # an eighth is for the journal's log


def size_of_one(served: Served, picture: bytes, expected: list[str]) -> int:
    with asked_once(served.client, picture, expected) as session:
        return session.state().kv_bytes


@pytest.mark.parametrize("setting", ["spill_bytes", "data_bytes"])
def test_those_used_last_are_kept_as_far_as_there_is_room(
    serve_data: Serve, picture: bytes, expected: list[str], setting: str
) -> None:
    served = serve_data()
    one = size_of_one(served, picture, expected)
    assert served.service.archive is not None
    served.service.archive.submit(served.service.archive.check_room).result()
    # Room for the journal to grow by less than another cache.
    bound = bound_that_leaves(served, 2 * one + one // 2) if setting == "data_bytes" else 2 * one
    client = serve_data(**{setting: str(bound)}).client
    sessions = [asked_once(client, picture, expected) for _ in range(3)]
    client = serve_data().client
    tiers = [restored_from(client.attach(session.name), QUESTIONS[1], expected[1]) for session in sessions]
    assert tiers == ["LOG", "DISK", "DISK"]


def test_they_make_room_for_sessions(serve_data: Serve, kv: Path, picture: bytes, expected: list[str]) -> None:
    served = serve_data()
    kept = asked_once(served.client, picture, expected)
    one = kept.state().kv_bytes
    bound = bound_that_leaves(served, 2 * one)
    served.stop()
    served = serve_data(data_bytes=str(bound))
    assert len(caches(kv)) == 1
    session = served.client.session("full")
    for side in range(30, 200):
        session.add_image(png(side, 60))
        if not caches(kv):
            break
    assert not caches(kv)
    assert restored_from(served.client.attach(kept.name), QUESTIONS[1], expected[1]) == "LOG"


def test_what_cannot_be_written_in_time_is_not_kept(
    serve_data: Serve, kv: Path, picture: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = OffloadedCache.save
    written: list[Path] = []

    def slow(cache: OffloadedCache, path: Path) -> None:
        written.append(path)
        time.sleep(0.5)
        save(cache, path)

    monkeypatch.setattr(OffloadedCache, "save", slow)
    served = serve_data(grace="300ms")
    sessions = [asked_once(served.client, picture, expected) for _ in range(2)]
    served.stop()
    assert len(written) <= 1 and not caches(kv)
    client = serve_data().client
    for session in sessions:
        assert restored_from(client.attach(session.name), QUESTIONS[1], expected[1]) == "LOG"


def test_whoever_watches_the_health_takes_no_time_from_it(
    serve_data: Serve, kv: Path, picture: bytes, expected: list[str]
) -> None:
    served = serve_data(grace="1s")
    asked_once(served.client, picture, expected)
    with grpc.insecure_channel(served.address) as channel:
        states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        served.stop()
    assert len(caches(kv)) == 1


def test_a_full_disk_does_not_keep_the_service_from_stopping(
    serve_data: Serve, kv: Path, picture: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(cache: OffloadedCache, path: Path) -> None:
        raise OSError(28, "No space left on device")

    served = serve_data()
    session = asked_once(served.client, picture, expected)
    with monkeypatch.context() as patched:
        patched.setattr(OffloadedCache, "save", full)
        served.stop()
    assert not caches(kv)
    session = serve_data().client.attach(session.name)
    assert restored_from(session, QUESTIONS[1], expected[1]) == "LOG"


def test_without_records_none_are_kept(
    serve: Serve, serve_data: Serve, kv: Path, picture: bytes, expected: list[str], tmp_path: Path
) -> None:
    served = serve_data()
    session = asked_once(served.client, picture, expected)
    served.stop()
    served = serve_data(ephemeral="on")
    asked_once(served.client, picture, expected)
    served.stop()
    assert len(caches(kv)) == 1, "what is not in use is not touched"
    served = serve(spill_dir=str(tmp_path / "spill"))
    asked_once(served.client, picture, expected)
    served.stop()
    assert not caches(tmp_path / "spill")
    session = serve_data().client.attach(session.name)
    assert restored_from(session, QUESTIONS[1], expected[1]) == "DISK"
