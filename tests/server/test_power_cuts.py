"""The store after a power cut at each change of the disk, and on a disk of which each call fails once.

Whatever was acknowledged is there, whole and once; what was not is there whole or not at all; what was deleted is gone.
"""

import errno
import itertools
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from tests.server.disk_trace import Change, Flushed, Named, Trace, after_a_cut, traced
from tests.server.persistence import archive_in
from vflow_client.v1.conversations_pb2 import Finished
from vflow_server.rpc.errors import ServiceError
from vflow_server.store import journal
from vflow_server.store.answers import StoredAnswer
from vflow_server.store.archive import PICTURES, Archive
from vflow_server.store.files import FOLDER, replace_file
from vflow_server.store.folder_lock import lock_data
from vflow_server.store.session_record import Entry, SessionFacts, SessionRecord, recover
from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.pipeline import CompressedImage, CompressionTimings

State = dict[str, tuple[int, ...]]
"""What the store holds: by session, a number for each entry; under the name of a file, the one that it says."""

NOTES = "strategies.json"


def picture(number: int) -> CompressedImage:
    """A picture of two tokens that belongs to no model; another one for each number."""
    whole, none = torch.arange(2), torch.zeros(2, dtype=torch.bool)
    return CompressedImage(
        digest=f"{number:064}",
        layout=TokenLayout(grid=whole, row=whole, column=whole, structural=none, boxes=torch.zeros(2, 4)),
        importance=torch.ones(2),
        kept=(whole,),
        recycled=whole[:0],
        embeddings=torch.full((2, 200), float(number)),
        positions=whole,
        span=2,
        timings=CompressionTimings(0.0, 0.0, 0.0),
    )


class Everything(random.Random):
    """Decides that all is on the disk: then it was not the power that went, but the process."""

    def random(self) -> float:
        return 0.0


@dataclass
class Store:
    """A store at work, and what it acknowledged.

    Attributes:
        archive: the store.
        folder: where it is.
        states: what it holds after each step that was begun.
        marks: how many changes there were on the disk when a step began, and when it was acknowledged.
        refused: what it would hold after each step that was refused.
    """

    archive: Archive
    folder: Path
    trace: Trace
    states: list[State] = field(default_factory=lambda: [{}])
    marks: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    refused: list[State] = field(default_factory=list)
    records: dict[str, SessionRecord] = field(default_factory=dict)
    numbers: Iterable[int] = field(default_factory=itertools.count)

    def step(self, state: State, work: Callable[[], object]) -> bool:
        """Do ``work``, after which the store holds ``state``; False if it was refused."""
        begun = len(self.trace.changes)
        try:
            work()
        except (ServiceError, OSError):
            self.refused.append(state)
            return False
        self.states.append(state)
        self.marks.append((begun, len(self.trace.changes)))
        return True

    def create(self, name: str) -> None:
        facts = SessionFacts(name, next(iter(self.numbers)), "red", "strategies/full", "{}", "model", 0.0)
        record = SessionRecord(facts, self.archive)
        if self.step({**self.states[-1], name: ()}, lambda: record.begin().result(20)):
            self.records[name] = record

    def write(self, name: str, number: int, *, shown: int | None = None, answered: bool = True) -> None:
        """Write an entry of a session, with the picture ``shown``."""
        if (record := self.records.get(name)) is None:
            return
        images = [] if shown is None else [picture(shown)]
        entry = Entry((number, *images, *range(300)), len(images), answered)
        answer = StoredAnswer(f"id-{number}", "print", Finished(text=str(number))) if answered else None
        state = {**self.states[-1], name: (*self.states[-1][name], number)}
        if self.step(state, lambda: record.write(entry, answer).result(20)):
            record.commit()

    def take_back(self, name: str, shown: int) -> None:
        """Write an entry and take it back, as a cancelled turn does."""
        if (record := self.records.get(name)) is not None:
            writing = record.write(Entry((9, picture(shown)), 1, True))
            record.take_back()
            with suppress(ServiceError):
                writing.result(20)
            # Not a step: nobody is told. What follows is written over it.
            with suppress(ServiceError):
                self.archive.submit(lambda connection: None).result(20)

    def fork(self, name: str, twin: str) -> None:
        if (origin := self.records.get(name)) is None:
            return
        facts = replace(origin.facts, name=twin, number=next(iter(self.numbers)))
        record = SessionRecord(facts, self.archive)
        if self.step({**self.states[-1], twin: self.states[-1][name]}, lambda: record.fork(origin).result(20)):
            self.records[twin] = record

    def delete(self, name: str) -> None:
        if (record := self.records.get(name)) is None:
            return
        state = {each: numbers for each, numbers in self.states[-1].items() if each != name}
        if self.step(state, lambda: record.delete().result(20)):
            del self.records[name]

    def note(self, number: int) -> None:
        file = self.folder / NOTES
        state = {**self.states[-1], NOTES: (number,)}
        if not self.step(state, lambda: replace_file(file, str(number))) and file.exists():
            # It holds the old content or the new: the flush of the folder may fail after the file was replaced.
            self.states[-1] = {**self.states[-1], NOTES: (int(file.read_text()),)}


def work(store: Store) -> None:
    """What a service does, in short."""
    store.create("a")
    store.write("a", 0, shown=1, answered=False)
    store.note(1)
    store.write("a", 1)
    store.create("b")
    store.write("b", 0, shown=1)
    store.take_back("b", 5)
    store.fork("b", "c")
    store.write("c", 2, shown=2)
    store.note(2)
    store.delete("b")
    store.delete("a")
    store.create("d")
    store.write("d", 0, shown=1)
    store.write("d", 1, shown=3)
    store.delete("c")
    store.write("d", 2)


def held(folder: Path) -> State:
    """What a new process finds in ``folder``, after it has checked that nothing is left over or missing."""
    with archive_in(folder) as archive:
        found = recover(archive, "model")
        state: State = {}
        for each in found:
            entries = each.record.read().result(20)
            numbers = tuple(entry.items[0] for entry in entries)
            state[each.record.facts.name] = tuple(number for number in numbers if isinstance(number, int))
            answers = [answer.finished.text for answer in each.record.answers().result(20)]
            assert answers == [str(entry.items[0]) for entry in entries if entry.answered][-len(answers) or None :] or (
                not answers
            )
        named = archive.submit(lambda connection: connection.execute("SELECT key FROM pictures").fetchall()).result(20)
        on_disk = sorted(path.name for path in (folder / PICTURES).iterdir())
        assert on_disk == sorted(f"{key}.safetensors" for (key,) in named)
    if (notes := folder / NOTES).exists():
        state[NOTES] = (int(notes.read_text()),)
    assert not (folder / FOLDER).exists(), "a power cut is no reason to set anything aside"
    return state


def sessions(state: State) -> State:
    return {name: numbers for name, numbers in state.items() if name != NOTES}


def allowed(store: Store, changes: int) -> list[State]:
    """What the store may hold when that many changes were asked for: all that was acknowledged, and perhaps more."""
    acknowledged = max(place for place, (_, end) in enumerate(store.marks) if end <= changes)
    begun = max(place for place, (begin, _) in enumerate(store.marks) if begin <= changes)
    return store.states[acknowledged : begun + 1]


def put(files: dict[str, bytes], folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def worked(
    folder: Path,
    patch: pytest.MonkeyPatch,
    fail: Callable[[str], int] = lambda what: 0,
    failures: list[int] | None = None,
) -> Store:
    """A store that did its work on a disk of which calls may fail. There is a copy of it from before it was closed.

    Args:
        folder: where it works.
        patch: for the time of the work.
        fail: see :class:`Trace`.
        failures: is given the number of changes at each failure.
    """
    folder.mkdir()
    patch.setattr(journal, "_IDLE", 0.01)
    with traced(folder, patch) as trace:
        lock = lock_data(folder)
        try:
            archive = Archive(lock, 1 << 30)
            store = Store(archive, folder, trace)

            def noted(what: str) -> int:
                if (code := fail(what)) and failures is not None:
                    failures.append(len(trace.changes))
                return code

            trace.fail = noted
            work(store)
            trace.fail = lambda what: 0
            archive.submit(lambda connection: None).result(20)
            shutil.copytree(folder, folder.with_name("killed"), dirs_exist_ok=True)
            archive.close()
        finally:
            lock.close()
    return store


def telling(changes: list[Change], place: int) -> bool:
    """Whether the worst that a cut at ``place`` can leave differs from what it leaves one change earlier."""
    return place == len(changes) or isinstance(changes[place - 1], Flushed | Named)


@pytest.mark.parametrize("seeds", [1, pytest.param(10, marks=pytest.mark.long)])
def test_a_power_cut_at_each_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int) -> None:
    store = worked(tmp_path / "data", monkeypatch)
    changes = store.trace.changes
    assert not store.refused and len(changes) > 100
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # of the copies, to save time
    for place in range(1, len(changes) + 1):
        chances: list[tuple[random.Random | None, float]] = []
        if telling(changes, place):
            chances.append((None, 0.0))
        if seeds > 1 or place % 5 == 0:
            chances.append((Everything(), 1.0))
        for seed in range(seeds):
            if seeds > 1 or place % 3 == 0:
                chances.append((random.Random(place * 1000 + seed), (0.0, 0.5, 1.0)[(place // 3 + seed) % 3]))
        for chance, names in chances:
            folder = put(after_a_cut(changes[:place], chance, names=names), tmp_path / "after")
            found = held(folder)
            assert found in allowed(store, place), (place, chance is None, names)
    assert held(tmp_path / "killed") == store.states[-1]


@pytest.mark.parametrize("stride", [40, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(("code", "calls"), [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.ENOSPC, 9)])
def test_each_call_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: int, stride: int
) -> None:
    """What was refused is not there, what was acknowledged is, and the store goes on when the disk does."""
    usual = 0

    def count(what: str) -> int:
        nonlocal usual
        usual += 1
        return 0

    worked(tmp_path / "usual", monkeypatch, count)
    refused = 0
    for first in range((code + calls) % stride, usual, stride):
        numbers, failures = itertools.count(), list[int]()
        place = tmp_path / str(first)
        place.mkdir()

        def fail(what: str, first: int = first, numbers: Iterator[int] = numbers) -> int:
            return code if first <= next(numbers) < first + calls else 0

        store = worked(place / "data", monkeypatch, fail, failures)
        refused += len(store.refused)
        for cut, chance in itertools.product(
            {failures[0] + later for later in (0, 1, 3, 9)} if failures else (), (None, Everything())
        ):
            found = held(put(after_a_cut(store.trace.changes[:cut], chance), tmp_path / "after"))
            # What could not be flushed may be on the disk even so, and a file that was replaced may not be.
            may = [sessions(state) for state in (*allowed(store, cut), *store.refused)]
            assert sessions(found) in may, (first, cut)
        assert held(place / "killed") == store.states[-1], first
        assert held(place / "data") == store.states[-1], first
        shutil.rmtree(place)
    assert refused


@pytest.mark.parametrize("deletes", [False, True])
def test_a_commit_whose_flush_failed_may_come_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deletes: bool
) -> None:
    """It was refused, yet the log holds it: until that is overwritten, its picture is neither deleted nor named."""
    monkeypatch.setattr(journal, "_IDLE", 60)
    (tmp_path / "data").mkdir()
    with traced(tmp_path / "data", monkeypatch) as trace:
        lock = lock_data(tmp_path / "data")
        store = Store(Archive(lock, 1 << 30), tmp_path / "data", trace)
        store.create("a")
        store.write("a", 0, shown=1)
        trace.fail = lambda what: errno.EIO if what == "sync" else 0
        if deletes:
            store.delete("a")
        else:
            store.write("a", 1, shown=2)
        assert len(store.refused) == 1
        shutil.copytree(tmp_path / "data", tmp_path / "killed")
        trace.fail = lambda what: 0
        assert [len(entries) for entries in [store.records["a"].read().result(20)]] == [1]
        store.write("a", 3)
        store.archive.close()
        lock.close()
    assert held(tmp_path / "killed") in (store.states[-2], store.refused[0])
    assert held(tmp_path / "data") == store.states[-1] == {"a": (0, 3)}
