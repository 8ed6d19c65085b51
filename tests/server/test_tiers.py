"""Idle KV caches are offloaded to host memory, then to files, and restored with the same answers."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Client, Session
from vflow_server.store.folder_lock import KV_LOCK
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import OffloadedCache

NO_MEMORY = {"offload_memory": "1"}


@pytest.fixture(scope="module")
def expected(runtime: Runtime, picture: bytes) -> list[str]:
    """The answers of a session that was never offloaded."""
    served = Served(runtime)
    with begun(served.client, picture) as session:
        answers = [answer_of(session, text) for text in ("Why?", "And?")]
    served.stop()  # before any other service holds pages of the same pool
    return answers


def begun(client: Client, picture: bytes) -> Session:
    session = client.session("preset-25")
    session.add_image(picture)
    answer_of(session, "What is this?")
    return session


def answer_of(session: Session, text: str) -> str:
    return session.ask(text, max_new_tokens=8).read()


def restored_from(session: Session, text: str, expected: str) -> str:
    """Ask, and have the expected answer; says from where the cache came back for it."""
    answer = session.ask(text, max_new_tokens=8)
    assert answer.read() == expected
    assert answer.receipt.restored == bool(answer.receipt.restored_from)
    return answer.receipt.RestoredFrom.Name(answer.receipt.restored_from)


def put_aside(served: Served) -> None:
    """Offload every idle session."""

    def release() -> None:
        while served.service.kv.release_idle():
            pass

    served.on_engine(release)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


@pytest.mark.parametrize(
    ("memory", "spill", "tier"),
    [("1GiB", True, "HOST_MEMORY"), ("1", True, "DISK"), ("1", False, "LOG")],
    ids=["memory", "disk", "log"],
)
def test_a_cache_comes_back_from_each_tier(
    serve: Serve, tmp_path: Path, picture: bytes, expected: list[str], memory: str, spill: bool, tier: str
) -> None:
    folder = tmp_path / "spill"
    served = serve(offload_memory=memory, **({"spill_dir": str(folder)} if spill else {}))
    session = begun(served.client, picture)
    put_aside(served)
    assert not session.state().resident and session.state().kv_bytes == 0
    if tier == "DISK":
        until(lambda: len(files(folder)) == 1)
    assert restored_from(session, "Why?", expected[0]) == tier
    assert restored_from(session, "And?", expected[1]) == "RESTORED_FROM_UNSPECIFIED"
    if spill:
        until(lambda: not files(folder))


def test_memory_overflows_into_files_least_recently_used_first(
    serve: Serve, tmp_path: Path, picture: bytes, expected: list[str]
) -> None:
    probe = serve()
    begun(probe.client, picture)
    put_aside(probe)
    one = probe.service.kv.offloaded._memory.bytes_held
    probe.stop()
    served = serve(offload_memory=str(2 * one), spill_dir=str(tmp_path), spill_bytes=str(2 * one))
    sessions = [begun(served.client, picture) for _ in range(5)]
    put_aside(served)
    # Two are in memory, the two before them in files, and the oldest of all has only its log.
    tiers = [restored_from(session, "Why?", expected[0]) for session in sessions]
    assert tiers == ["LOG", "DISK", "DISK", "HOST_MEMORY", "HOST_MEMORY"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a bit flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "not readable": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_means_rebuilding(
    serve: Serve,
    tmp_path: Path,
    picture: bytes,
    expected: list[str],
    damage: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    served = serve(spill_dir=str(tmp_path), **NO_MEMORY)
    session = begun(served.client, picture)
    put_aside(served)
    spill = served.service.kv.offloaded._spill
    assert spill is not None
    # A file is there a moment before its digest is known: damage done in between is a failure to write.
    until(lambda: bool(spill._unwritten) and all(digest.done() for digest in spill._unwritten))
    (path,) = files(tmp_path)
    damage(path)
    assert restored_from(session, "Why?", expected[0]) == "LOG"
    assert "will be rebuilt" in capsys.readouterr().out
    if path.is_dir():
        path.rmdir()


def test_a_full_disk_costs_only_time(
    serve: Serve,
    tmp_path: Path,
    picture: bytes,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(cache: OffloadedCache, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OffloadedCache, "save", full)
    served = serve(spill_dir=str(tmp_path), **NO_MEMORY)
    session = begun(served.client, picture)
    put_aside(served)
    assert restored_from(session, "Why?", expected[0]) == "LOG"
    assert "No space left" in capsys.readouterr().out


def test_the_file_of_a_deleted_session_goes_away(serve: Serve, tmp_path: Path, picture: bytes) -> None:
    served = serve(spill_dir=str(tmp_path), **NO_MEMORY)
    session = begun(served.client, picture)
    put_aside(served)
    until(lambda: len(files(tmp_path)) == 1)
    session.delete()
    until(lambda: not files(tmp_path))


def test_what_a_dead_process_left_goes_away_and_nothing_else(serve: Serve, tmp_path: Path, picture: bytes) -> None:
    ours = ["vflow-kv-0.safetensors", "vflow-kv-12.safetensors.partial"]
    others = ["model.safetensors", "vflow-kv-.safetensors", "vflow-kv-1.safetensors.bak", "notes.txt"]
    for name in ours + others:
        (tmp_path / name).write_text("left behind")
    served = serve(spill_dir=str(tmp_path), **NO_MEMORY)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, KV_LOCK])
    with pytest.raises(OSError, match="give each its own --spill-dir"):
        serve(spill_dir=str(tmp_path))
    begun(served.client, picture)
    put_aside(served)
    until(lambda: len(files(tmp_path)) == 3)
    served.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, KV_LOCK])
    serve(spill_dir=str(tmp_path))  # it is free again


def test_a_fork_of_what_lies_in_a_file(serve: Serve, tmp_path: Path, picture: bytes, expected: list[str]) -> None:
    served = serve(spill_dir=str(tmp_path), **NO_MEMORY)
    session = begun(served.client, picture)
    put_aside(served)
    twin = session.fork()
    assert [restored_from(each, "Why?", expected[0]) for each in (twin, session)] == ["DISK", "DISK"]
    assert [answer_of(each, "And?") for each in (session, twin)] == [expected[1]] * 2


class TestASlowDisk:
    """Reading takes as long as the test likes."""

    @pytest.fixture
    def gate(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        gate, load = threading.Event(), OffloadedCache.load

        def slow(path: Path) -> OffloadedCache:
            gate.wait(10)
            return load(path)

        monkeypatch.setattr(OffloadedCache, "load", slow)
        return gate

    def test_holds_up_only_the_session_whose_file_it_is(
        self, serve: Serve, tmp_path: Path, picture: bytes, expected: list[str], gate: threading.Event
    ) -> None:
        served = serve(spill_dir=str(tmp_path), **NO_MEMORY)
        session = begun(served.client, picture)
        put_aside(served)
        slow = session.ask("Why?", max_new_tokens=8)
        until(lambda: served.live(session).busy)
        with served.client.session() as other:
            assert other.ask("Meanwhile?", max_new_tokens=4).read()
        assert not gate.is_set()
        gate.set()
        assert slow.read() == expected[0] and slow.receipt.restored

    def test_is_no_matter_to_one_who_does_not_wait(
        self, serve: Serve, tmp_path: Path, picture: bytes, expected: list[str], gate: threading.Event
    ) -> None:
        served = serve(spill_dir=str(tmp_path), **NO_MEMORY)
        session = begun(served.client, picture)
        put_aside(served)
        impatient = session.ask("Well?", max_new_tokens=8)
        until(lambda: served.live(session).busy)
        impatient.close()
        until(lambda: not served.live(session).busy)
        gate.set()
        assert restored_from(session, "Why?", expected[0]) == "DISK", "the file is still there"


@pytest.mark.parametrize("memory", ["1GiB", "1"], ids=["brought back", "rebuilt"])
def test_a_cancelled_turn_leaves_what_was_restored_for_it(
    serve: Serve, picture: bytes, expected: list[str], memory: str
) -> None:
    served = serve(offload_memory=memory)
    session = begun(served.client, picture)
    held = session.state().kv_bytes
    put_aside(served)
    answer = session.ask("Well?", max_new_tokens=4000)
    next(answer)
    answer.close()
    until(lambda: not served.live(session).busy)
    state = session.state()
    assert state.resident and state.turn_count == 1 and held <= state.kv_bytes <= held * 1.5
    assert restored_from(session, "Why?", expected[0]) == "RESTORED_FROM_UNSPECIFIED"


def test_a_disk_that_cannot_keep_up_is_not_waited_for(
    serve: Serve, tmp_path: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate, save = threading.Event(), OffloadedCache.save

    def slow(cache: OffloadedCache, path: Path) -> None:
        gate.wait(10)
        save(cache, path)

    monkeypatch.setattr(OffloadedCache, "save", slow)
    monkeypatch.setattr("vflow_server.kv.disk._MOST_UNWRITTEN", 2)
    served = serve(spill_dir=str(tmp_path), **NO_MEMORY)
    sessions = [begun(served.client, picture) for _ in range(3)]
    put_aside(served)
    assert "too slow" in capsys.readouterr().out
    gate.set()
    until(lambda: len(files(tmp_path)) == 2)
    for session in sessions:
        session.delete()
