"""A session's record: the part of the data folder that lets the session continue after a restart.

It holds the session's log in entries, one for each turn and for each picture that was added before a turn, and the
answers to its latest requests. An entry is on the disk completely or not at all. The pictures are in separate files,
which the entries name. Checksums are verified when a record is read.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import structlog
from google.protobuf.message import DecodeError

from vflow_client.v1 import conversations_pb2
from vflow_server.rpc.errors import session_damaged, session_deleted
from vflow_server.store.answers import REMEMBERED, StoredAnswer
from vflow_server.store.archive import Archive
from vflow_server.store.picture_folder import PictureLost
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.sequence import Item

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """Items that were appended to a session's log together.

    Attributes:
        items: tokens and pictures, including those of the answer.
        images: number of pictures among them.
        answered: whether the entry is a turn; if not, it is a picture that was added before a turn.
    """

    items: tuple[Item, ...]
    images: int
    answered: bool


@dataclass(frozen=True)
class SessionFacts:
    """The part of a session's record that never changes.

    Attributes:
        name: resource name of the session.
        number: position in the order of creation of all sessions.
        tenant: the tenant that it belongs to.
        strategy_name: resource name of its strategy.
        strategy: that strategy, as JSON.
        model: revision of its model.
        created: Unix time in seconds.
    """

    name: str
    number: int
    tenant: str
    strategy_name: str
    strategy: str
    model: str
    created: float


class SessionRecord:
    """The record of one session.

    Its methods may be called from any thread. They submit an action to the archive's thread and do not wait: the future
    is done when the action is on the disk. It raises STORAGE_FAILED if that fails; then nothing was changed.

    Args:
        facts: the part that never changes.
        archive: stores the record.
        entries: number of entries that the record has already.
        stored: whether it is in the archive already.

    Attributes:
        stored: whether it may be in the archive, so that it has to be deleted.
    """

    def __init__(self, facts: SessionFacts, archive: Archive, entries: int = 0, *, stored: bool = False) -> None:
        self.facts = facts
        self.stored = stored
        self._archive = archive
        self._entries = entries

    def begin(self) -> Future[None]:
        """Create the record.

        The future raises CAPACITY_EXHAUSTED if the data folder is full.
        """
        self.stored = True
        return self._archive.submit(self._insert)

    def write(self, entry: Entry, answer: StoredAnswer | None = None) -> Future[None]:
        """Write the next entry and its answer. Call :meth:`commit` or :meth:`take_back` afterwards.

        The future raises SESSION_DELETED if the record was deleted, CAPACITY_EXHAUSTED if the data folder is full.
        """
        number = self._entries

        def write(connection: sqlite3.Connection) -> None:
            self._check_exists(connection)
            self._truncate(connection, number)
            keys = {id(item): self._archive.put(connection, self.facts.tenant, item) for item in _pictures(entry.items)}
            items = json.dumps([item if isinstance(item, int) else keys[id(item)] for item in entry.items])
            self._insert_row(connection, "entries", number, items, entry.images, entry.answered)
            connection.executemany(
                "INSERT INTO shown (picture, session, entry) VALUES (?, ?, ?)",
                [(key, self.facts.name, number) for key in set(keys.values())],
            )
            connection.execute("UPDATE sessions SET used = ? WHERE name = ?", (time.time(), self.facts.name))
            if answer is not None:
                self._insert_answer(connection, number, answer)
            self._archive.check_room(connection, tenant=self.facts.tenant)

        return self._archive.submit(write)

    def commit(self) -> None:
        """Confirm the entry that was written last."""
        self._entries += 1

    def take_back(self) -> None:
        """Undo the last :meth:`write`, which was not confirmed."""
        number = self._entries
        self._archive.submit(lambda connection: self._truncate(connection, number))

    def fork(self, origin: SessionRecord) -> Future[None]:
        """Create the record with the entries of ``origin``, without its answers.

        The future raises CAPACITY_EXHAUSTED if the data folder is full, SESSION_DAMAGED if ``origin`` is damaged,
        SESSION_DELETED if it was deleted.
        """
        self.stored = True
        self._entries = entries = origin._entries

        def fork(connection: sqlite3.Connection) -> None:
            origin._check_exists(connection)  # or the twin would have none of the turns that its callers know
            self._insert(connection)
            rows = connection.execute(
                "SELECT number, items, images, answered, checksum FROM entries WHERE session = ? AND number < ?",
                (origin.facts.name, entries),  # one more is there if the disk has not let it be taken back
            ).fetchall()
            for number, *values, checksum in rows:
                origin._check(checksum, number, *values)
                self._insert_row(connection, "entries", number, *values)
            connection.execute(
                "INSERT INTO shown (picture, session, entry) "
                "SELECT picture, ?, entry FROM shown WHERE session = ? AND entry < ?",
                (self.facts.name, origin.facts.name, entries),
            )
            self._archive.check_room(connection, tenant=self.facts.tenant)

        return self._archive.submit(fork)

    def read(self) -> Future[list[Entry]]:
        """Read all entries; the future raises SESSION_DAMAGED if an entry or a picture is damaged or missing."""

        def read(connection: sqlite3.Connection) -> list[Entry]:
            rows = connection.execute(
                "SELECT number, items, images, answered, checksum FROM entries WHERE session = ? ORDER BY number",
                (self.facts.name,),
            ).fetchall()
            pictures: dict[str, CompressedImage] = {}
            entries: list[Entry] = []
            for place, (number, items, images, answered, checksum) in enumerate(rows):
                self._check(checksum, number, items, images, answered)
                if number != place:
                    raise session_damaged(self.facts.name, f"entry {place} is missing")
                log = json.loads(items)
                for key in {item for item in log if isinstance(item, str)} - pictures.keys():
                    try:
                        pictures[key] = self._archive.pictures.read(key)
                    except PictureLost as error:
                        raise session_damaged(self.facts.name, error) from error
                restored = tuple(pictures[item] if isinstance(item, str) else item for item in log)
                entries.append(Entry(restored, images, bool(answered)))
            return entries

        return self._archive.submit(read)

    def answers(self) -> Future[list[StoredAnswer]]:
        """Read the stored answers, oldest first; the future raises SESSION_DAMAGED if one is damaged."""

        def answers(connection: sqlite3.Connection) -> list[StoredAnswer]:
            rows = connection.execute(
                "SELECT entry, request_id, fingerprint, finished, checksum FROM answers WHERE session = ? "
                "ORDER BY entry",
                (self.facts.name,),
            )
            found: list[StoredAnswer] = []
            for entry, request_id, fingerprint, finished, checksum in rows:
                self._check(checksum, entry, request_id, fingerprint, finished)
                try:
                    message = conversations_pb2.Finished.FromString(finished)
                except DecodeError as error:
                    raise session_damaged(self.facts.name, error) from error
                found.append(StoredAnswer(request_id, fingerprint, message))
            return found

        return self._archive.submit(answers)

    def delete(self) -> Future[None]:
        """Delete the record, and the pictures that no other record names."""

        def delete(connection: sqlite3.Connection) -> None:
            keys = self._shown(connection)
            connection.execute("DELETE FROM sessions WHERE name = ?", (self.facts.name,))
            self._archive.let_go(connection, keys)

        return self._archive.submit(delete)

    def _insert(self, connection: sqlite3.Connection) -> None:
        facts = self.facts
        connection.execute(
            "INSERT INTO sessions (name, sequence, tenant, strategy_name, strategy, model, created, used) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                facts.name,
                facts.number,
                facts.tenant,
                facts.strategy_name,
                facts.strategy,
                facts.model,
                facts.created,
                facts.created,
            ),
        )
        self._archive.check_room(connection, tenant=self.facts.tenant)

    def _check_exists(self, connection: sqlite3.Connection) -> None:
        found = connection.execute("SELECT 1 FROM sessions WHERE name = ?", (self.facts.name,)).fetchone()
        if found is None:
            raise session_deleted(self.facts.name)

    def _insert_answer(self, connection: sqlite3.Connection, number: int, answer: StoredAnswer) -> None:
        name = self.facts.name
        message = answer.finished.SerializeToString()
        self._insert_row(connection, "answers", number, answer.request_id, answer.fingerprint, message)
        connection.execute(
            "DELETE FROM answers WHERE session = ? AND entry NOT IN "
            "(SELECT entry FROM answers WHERE session = ? ORDER BY entry DESC LIMIT ?)",
            (name, name, REMEMBERED),
        )

    def _insert_row(self, connection: sqlite3.Connection, table: str, number: int, *values: object) -> None:
        """Insert a row of this session with its checksum; ``values`` are in the order of the table's columns."""
        row = (self.facts.name, number, *values, _checksum(self.facts.name, number, *values))
        connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)

    def _truncate(self, connection: sqlite3.Connection, entries: int) -> None:
        """Delete all entries but the first ``entries``."""
        keys = self._shown(connection, entries)
        gone = connection.execute("DELETE FROM entries WHERE session = ? AND number >= ?", (self.facts.name, entries))
        if gone.rowcount:
            self._archive.let_go(connection, keys)

    def _shown(self, connection: sqlite3.Connection, first: int = 0) -> list[str]:
        """Keys of the pictures in the entries from ``first`` on."""
        rows = connection.execute(
            "SELECT DISTINCT picture FROM shown WHERE session = ? AND entry >= ?", (self.facts.name, first)
        )
        return [key for (key,) in rows]

    def _check(self, checksum: str, *values: object) -> None:
        if _checksum(self.facts.name, *values) != checksum:
            raise session_damaged(self.facts.name, "an entry is not what was written")


def _pictures(items: Iterable[Item]) -> list[CompressedImage]:
    return [item for item in items if isinstance(item, CompressedImage)]


def _checksum(*values: object) -> str:
    """Digest of the values of a row; booleans count as integers, as SQLite returns them."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        part = value if isinstance(value, bytes) else str(int(value) if isinstance(value, int) else value).encode()
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


@dataclass(frozen=True)
class Recovered:
    """A session of an earlier process.

    Attributes:
        record: its record.
        used: Unix time in seconds of the end of its last turn or picture.
        turns: number of finished turns.
        images: number of pictures and videos in its log.
    """

    record: SessionRecord
    used: float
    turns: int
    images: int


def recover(archive: Archive, model: str, earlier: Callable[[], Collection[str]] = frozenset[str]) -> list[Recovered]:
    """All sessions that ``archive`` stores, oldest first.

    Args:
        archive: stores them.
        model: revision of the model that is served.
        earlier: returns the revisions that earlier releases gave to that model; their sessions are taken over.

    Raises:
        ServiceError: STORAGE_FAILED.
    """

    def sessions(connection: sqlite3.Connection) -> list[Recovered]:
        rows = connection.execute(
            "SELECT name, sequence, tenant, strategy_name, strategy, model, created, used, count(number), "
            "coalesce(sum(answered), 0), coalesce(sum(images), 0) "
            "FROM sessions LEFT JOIN entries ON session = name GROUP BY name ORDER BY sequence"
        )
        return [
            Recovered(SessionRecord(SessionFacts(*facts), archive, entries, stored=True), used, turns, images)
            for *facts, used, entries, turns, images in rows
        ]

    def models(connection: sqlite3.Connection) -> set[str]:
        return {model for (model,) in connection.execute("SELECT DISTINCT model FROM sessions")}

    def take_over(connection: sqlite3.Connection) -> int:
        changed = [connection.execute("UPDATE sessions SET model = ? WHERE model = ?", (model, each)) for each in old]
        return sum(cursor.rowcount for cursor in changed)

    if (others := archive.submit(models).result() - {model}) and (old := others.intersection(earlier())):
        log.info("sessions of an earlier release were taken over", sessions=archive.submit(take_over).result())
    return archive.submit(sessions).result()
