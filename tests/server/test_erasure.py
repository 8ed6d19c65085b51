"""What is deleted is gone from the disk, whatever SQLite does by itself."""

import sqlite3
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.persistence import answer_of, begun, files, say


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
