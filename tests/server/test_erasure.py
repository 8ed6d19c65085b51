"""What is deleted is gone from the disk, whatever SQLite does by itself."""

import sqlite3
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.persistence import answer_of, begun, files, say
from tests.server.waiting import until
from vflow_server.store.archive import JOURNAL


@pytest.fixture(autouse=True)
def careless_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite with its default settings. Some distributions build it so that it overwrites deleted data."""
    connect = sqlite3.connect

    def careless(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)  # type: ignore[call-overload]
        connection.execute("PRAGMA secure_delete=OFF")
        assert isinstance(connection, sqlite3.Connection)
        return connection

    monkeypatch.setattr(sqlite3, "connect", careless)


def holding(data: Path, needles: list[bytes]) -> list[tuple[str, bytes]]:
    """Which files contain which needles."""
    living = [path for path in data.rglob("*") if path.is_file()]
    return [(path.name, needle) for path in living for needle in needles if needle in path.read_bytes()]


@pytest.mark.parametrize("turns", [1, 30])
def test_nothing_of_a_deleted_session_is_left(serve_data: Serve, data: Path, picture: bytes, turns: int) -> None:
    served = serve_data()
    session, other = begun(served.client, picture), begun(served.client, picture)
    needles = [session.name.encode()]
    for number in range(turns):
        finished = say(served, session, f"Question {number}", f"needle-{number:03}")
        needles += [f"needle-{number:03}".encode(), finished.text.encode()]
        say(served, other, f"Other {number}", f"other-{number:03}")
    needles = [needle for needle in needles if len(needle) > 4]
    assert holding(data, needles)
    session.delete()
    assert not holding(data, needles)
    assert answer_of(other, "Still there?")
    other.delete()
    assert not files(data)


def test_a_cancelled_turn_leaves_nothing_either(serve_data: Serve, data: Path) -> None:
    served = serve_data()
    session = served.client.session()
    answer = session.ask("A needle in a haystack", max_new_tokens=2000)
    next(answer)
    answer.close()
    until(lambda: not served.live(session).busy)
    until(lambda: (data / f"{JOURNAL}-wal").stat().st_size == 0)
    assert session.state().turn_count == 0 and not holding(data, [b"needle"])


def test_a_backup_that_reads_meanwhile_only_delays_it(serve_data: Serve, data: Path) -> None:
    served = serve_data()
    session = served.client.session()
    say(served, session, "What is this?", "the-needle")
    reader = sqlite3.connect(data / JOURNAL, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM answers").fetchone() == (1,)
    session.delete()
    assert reader.execute("SELECT count(*) FROM answers").fetchone() == (1,)
    reader.close()
    until(lambda: not holding(data, [b"the-needle"]))


def test_a_damaged_cache_of_a_deleted_session_is_gone(serve_data: Serve, data: Path, picture: bytes) -> None:
    served = serve_data()
    session = begun(served.client, picture)
    answer_of(session, "What is this?")
    served.stop()
    (cache,) = (data / "kv").glob("*.safetensors")
    cache.write_bytes(cache.read_bytes()[:-1] + b"needle")
    served = serve_data()
    session = served.client.attach(session.name)
    answer_of(session, "And now?")
    session.delete()
    until(lambda: not holding(data, [b"needle"]))
