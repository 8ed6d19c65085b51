"""What was acknowledged survives a power cut, and only the owner can read the files."""

import os
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.persistence import QUESTIONS, answer_of, begun
from tests.server.power_cut import watched


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty folder, which is on the disk."""
    root = tmp_path / "root"
    root.mkdir()
    return root


def test_pictures_and_turns_outlive_a_power_cut(
    serve: Serve, root: Path, tmp_path: Path, picture: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(root, monkeypatch) as disk:
        served = serve(data=str(root / "var" / "data"))
        session = begun(served.client, picture)
        answers: list[str] = []
        for turns, question in enumerate(QUESTIONS):
            disk.cut(tmp_path / f"after-{turns}")
            answers.append(answer_of(session, question))
        twin = session.fork()
        disk.cut(tmp_path / "forked")
        session.delete()
        disk.cut(tmp_path / "deleted")
        served.stop()
    assert answers == expected
    for turns, question in enumerate(QUESTIONS):
        served = serve(data=str(tmp_path / f"after-{turns}" / "var" / "data"))
        (state,) = served.client.sessions()
        assert (state.name, state.turn_count, state.image_count) == (session.name, turns, 1)
        assert answer_of(served.client.attach(session.name), question) == expected[turns]
        served.stop()
    for when, living in {"forked": [session.name, twin.name], "deleted": [twin.name]}.items():
        served = serve(data=str(tmp_path / when / "var" / "data"))
        assert [state.name for state in served.client.sessions()] == living
        assert answer_of(served.client.attach(twin.name), "And now?")
        served.stop()


def test_strategies_outlive_a_power_cut(
    serve: Serve, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(root, monkeypatch) as disk:
        served = serve(data=str(root / "var" / "data"))
        served.client.strategies.create("made", ratios=[0.5, 0.5, 0.5])
        disk.cut(tmp_path / "created")
        served.client.strategies.create("other", ratios=[0.4, 0.4, 0.4])
        served.client.strategies.activate("made")
        disk.cut(tmp_path / "activated")
        served.stop()
    strategies = serve(data=str(tmp_path / "created" / "var" / "data")).client.strategies
    assert not strategies.get("made").active
    strategies = serve(data=str(tmp_path / "activated" / "var" / "data")).client.strategies
    assert strategies.get("made").active and not strategies.get("other").active


def test_what_is_written_is_its_owners_alone(serve: Serve, tmp_path: Path, picture: bytes) -> None:
    data = tmp_path / "data"
    umask = os.umask(0)
    try:
        data.mkdir(mode=0o777)  # as an operator or a container may have made it
        served = serve(data=str(data))
        session = begun(served.client, picture)
        answer_of(session, "What is this?")
        session.add_image(png(30, 40))
        served.client.strategies.activate("preset-50")
        living = list(data.rglob("*"))
        open_to_others = {path.name: oct(path.stat().st_mode) for path in living if _tells_others(path)}
        served.stop()
        open_to_others |= {path.name: oct(path.stat().st_mode) for path in data.rglob("*") if _tells_others(path)}
    finally:
        os.umask(umask)
    assert {"strategies.json", "sessions.sqlite3", "sessions.sqlite3-wal"} <= {path.name for path in living}
    assert any(path.match("pictures/*.safetensors") for path in living)
    assert any(path.match("kv/*.safetensors") for path in data.rglob("*"))
    assert not open_to_others


def _tells_others(path: Path) -> bool:
    """Whether others may read ``path`` and find something in it; locks are empty."""
    return bool(path.stat().st_mode & 0o077 and path.stat().st_size)
