"""Files that change while they are read."""

from pathlib import Path

import pytest

from vflow_server.access import watched_files
from vflow_server.access.watched_files import WatchedFiles


def test_what_is_read_while_it_is_written_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY", 0.0)
    file, rest = tmp_path / "tokens", list[str]()
    file.write_text("old")

    def read() -> str:
        text = file.read_text()
        if rest:
            file.write_text(text + rest.pop())
        return text

    watched = WatchedFiles([file], read)
    assert watched.current() == "old"
    file.write_text("new, first half")
    rest.append(", second half")
    assert watched.current() == "old"
    assert watched.current() == "new, first half, second half"
