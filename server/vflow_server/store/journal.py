"""The journal: an SQLite database and the one thread that uses it.

What is handed in together is committed together, in the order in which it came, and is on the disk when its future is
done. So neither the event loop nor the engine's thread waits for a disk, and a busy service pays for few flushes.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import structlog

from vflow_server.rpc.errors import storage_failed
from vflow_server.store.files import WrittenByNewerRelease, set_aside
from vflow_server.telemetry.metrics import Metrics

R = TypeVar("R")

Action = Callable[[sqlite3.Connection], R]
"""What is done within a transaction of the journal's thread. It begins and ends none itself."""

_APPLICATION = 0x56464C57
"""Marks a database as this service's (``PRAGMA application_id``)."""

_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE sessions (
        name TEXT PRIMARY KEY,
        sequence INTEGER NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        strategy_name TEXT NOT NULL,
        strategy TEXT NOT NULL,
        model TEXT NOT NULL,
        created REAL NOT NULL,
        used REAL NOT NULL
    ) WITHOUT ROWID;

    CREATE TABLE entries (
        session TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE,
        number INTEGER NOT NULL,
        items TEXT NOT NULL,
        images INTEGER NOT NULL,
        answered INTEGER NOT NULL,
        checksum TEXT NOT NULL,
        PRIMARY KEY (session, number)
    ) WITHOUT ROWID;

    CREATE TABLE answers (
        session TEXT NOT NULL,
        entry INTEGER NOT NULL,
        request_id TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        finished BLOB NOT NULL,
        checksum TEXT NOT NULL,
        PRIMARY KEY (session, entry),
        FOREIGN KEY (session, entry) REFERENCES entries ON DELETE CASCADE
    ) WITHOUT ROWID;

    CREATE TABLE pictures (key TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;

    CREATE TABLE shown (
        picture TEXT NOT NULL REFERENCES pictures,
        session TEXT NOT NULL,
        entry INTEGER NOT NULL,
        PRIMARY KEY (picture, session, entry),
        FOREIGN KEY (session, entry) REFERENCES entries ON DELETE CASCADE
    ) WITHOUT ROWID;
    CREATE INDEX shown_by_entry ON shown (session, entry);
    """,
)
"""Each takes the schema one version further (``PRAGMA user_version``); what is released never changes."""

_TOGETHER = 64
"""Actions that are committed together at most."""

log = structlog.get_logger(__name__)


class _Damaged(sqlite3.DatabaseError):
    """What opens as a database, but is damaged or somebody else's."""


@dataclass(frozen=True, eq=False)
class _Handed(Generic[R]):
    action: Action[R]
    future: Future[R]


class Journal:
    """The database and its thread.

    A file that is damaged, or is not a journal, is set aside and a new one begun.

    Args:
        file: made if it does not exist; no other process may use it.
        committed: called in the thread after each commit, with the connection.
        metrics: counts commits; None: nobody looks.

    Raises:
        WrittenByNewerRelease: it is left as it is.
        OSError: it cannot be opened or written.
    """

    def __init__(
        self,
        file: Path,
        committed: Callable[[sqlite3.Connection], None] = lambda connection: None,
        metrics: Metrics | None = None,
    ) -> None:
        self._file = file
        self._committed = committed
        self._metrics = metrics or Metrics()
        try:
            self._connection = _open(file)
        except sqlite3.DatabaseError as error:
            if not _damaged(error):
                raise OSError(f"{file} cannot be opened or written ({error}); check its rights, and room") from error
            for part in ("", "-wal", "-shm"):
                if (damaged := file.with_name(file.name + part)).exists():
                    set_aside(damaged, error)
            self._connection = _open(file)
        self._identity = _identity(file)
        self._handed: SimpleQueue[_Handed[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vflow-journal", daemon=True)
        self._thread.start()

    def submit(self, action: Action[R]) -> Future[R]:
        """Hand in an action, from any thread.

        The future is done when the action's transaction is on the disk. It raises what the action raised, which then
        has changed nothing, or STORAGE_FAILED. Cancelled before its turn comes, the action never was.
        """
        handed = _Handed(action, Future())
        self._handed.put(handed)
        return handed.future

    def close(self) -> None:
        """Do what was handed in, and end. Nothing may be handed in any more."""
        self._handed.put(None)
        self._thread.join()
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()

    def _run(self) -> None:
        going = True
        while going:
            batch = [self._handed.get()]
            while len(batch) < _TOGETHER and not self._handed.empty():
                batch.append(self._handed.get())
            going = None not in batch
            self._commit([handed for handed in batch if handed and handed.future.set_running_or_notify_cancel()])

    def _commit(self, batch: Sequence[_Handed[Any]]) -> None:
        outcomes: list[tuple[Any, BaseException | None]] = []
        begun = time.perf_counter()
        try:
            if _identity(self._file) != self._identity:
                raise OSError(f"{self._file} was deleted or replaced; restart the service")
            # Not IMMEDIATE: there is no other writer, and what only reads may go on where nothing can be written.
            self._connection.execute("BEGIN")
            outcomes = [self._attempt(handed) for handed in batch]
            self._connection.execute("COMMIT")
        except Exception as error:
            with suppress(sqlite3.Error):
                self._connection.rollback()
            outcomes = [(None, error)] * len(batch)
            self._metrics.commit_failed()
        else:
            self._metrics.committed(time.perf_counter() - begun)
            self._after_commit()
        for handed, (result, failure) in zip(batch, outcomes, strict=True):
            if failure is None:
                handed.future.set_result(result)
            else:
                handed.future.set_exception(_told(failure))

    def _attempt(self, handed: _Handed[Any]) -> tuple[Any, BaseException | None]:
        self._connection.execute("SAVEPOINT action")
        try:
            result = handed.action(self._connection)
        except Exception as error:
            if not self._connection.in_transaction:  # SQLite gave up the whole of it, as it does when a disk is full
                raise
            self._connection.execute("ROLLBACK TO action")
            self._connection.execute("RELEASE action")
            return None, error
        self._connection.execute("RELEASE action")
        return result, None

    def _after_commit(self) -> None:
        try:
            self._committed(self._connection)
        except Exception:
            log.exception("what follows a commit failed")


def _open(file: Path) -> sqlite3.Connection:
    # SQLite would make the file as open to others as the umask allows. What it puts beside the file has its rights.
    with suppress(OSError):  # SQLite says what is wrong
        os.close(os.open(file, os.O_RDONLY | os.O_CREAT, 0o600))
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=0)
    try:
        _check_ours(connection, file)
        # FULL: what was acknowledged outlives the machine, not only the process.
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {setting}")
        _migrate(connection, file)
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _Damaged(verdict)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_ours(connection: sqlite3.Connection, file: Path) -> None:
    """Look before anything is written: somebody else's database, or a later one, stays as it is."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION and (application or tables):
        raise _Damaged("it is not a journal of this service")
    if version > len(_MIGRATIONS):
        raise WrittenByNewerRelease(file, version, len(_MIGRATIONS))


def _migrate(connection: sqlite3.Connection, file: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for number, migration in enumerate(_MIGRATIONS[version:], version + 1):
        log.info("migrating the journal", file=str(file), schema=number)
        connection.executescript(
            f"BEGIN; {migration} PRAGMA user_version={number}; PRAGMA application_id={_APPLICATION}; COMMIT;"
        )


def _damaged(error: sqlite3.DatabaseError) -> bool:
    if isinstance(error, _Damaged):
        return True
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _told(failure: BaseException) -> BaseException:
    """What to tell whoever handed in an action that failed."""
    if not isinstance(failure, sqlite3.Error | OSError):
        return failure
    log.error("the data folder cannot be used", because=str(failure))
    refusal = storage_failed(failure)
    refusal.__cause__ = failure
    return refusal
