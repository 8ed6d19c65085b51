"""A data folder that the release before wrote: its sessions go on, under whatever version of the libraries."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import transformers

from tests.server.persistence import say
from tests.server.served import Served
from vflow_server.store.archive import JOURNAL
from vflowopt.demo import model_path
from vflowopt.runtime.model_runner import Runtime

WRITTEN = Path(__file__).parent / "written_before"
"""A folder written with the embedded model at commit 0ec40bb and transformers 5.23.0, and what followed there."""


@pytest.fixture(scope="module")
def embedded() -> Runtime:
    return Runtime.load(model_path(), kv_budget=64 << 20)


@pytest.fixture
def served(embedded: Runtime, tmp_path: Path) -> Iterator[Served]:
    shutil.copytree(WRITTEN / "data", tmp_path / "data")
    served = Served(embedded, data=str(tmp_path / "data"))
    yield served
    served.stop()


def test_its_sessions_go_on(served: Served, embedded: Runtime, tmp_path: Path) -> None:
    before = json.loads((WRITTEN / "expected.json").read_text())
    first, fork = served.client.attach(before["first"]), served.client.attach(before["fork"])
    questions = before["questions"]
    for text, answer, name in zip(questions, before["replay"], ("first", "second"), strict=False):
        found = say(served, first, text, name, 12)
        assert found.receipt.replayed and found.text == answer
    assert [say(served, first, text, "", 12).text for text in questions[3:5]] == before["next"]
    assert [say(served, fork, questions[3], "", 12).text] == before["fork_next"]
    assert served.client.strategies.get("mine").active
    with closing(sqlite3.connect(tmp_path / "data" / JOURNAL)) as connection:
        assert connection.execute("SELECT DISTINCT model FROM sessions").fetchall() == [(embedded.revision,)]
    assert before["revision"] in embedded.earlier_revisions() and before["revision"] != embedded.revision


def test_a_later_version_of_the_library_takes_them_over_too(embedded: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((WRITTEN / "expected.json").read_text())
    monkeypatch.setattr(transformers, "__version__", "5.40.0")
    assert before["revision"] in embedded.earlier_revisions()
