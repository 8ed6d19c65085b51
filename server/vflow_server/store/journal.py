"""The journal: an SQLite database and the one thread that uses it.

Actions that wait at the same time are committed together, in the order in which they were submitted. The future of an
action is done once it is on the disk. So neither the event loop nor the engine's thread waits for a disk, and a busy
service needs few flushes.
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
from vflow_server.watchdog.pulse import Pulse

R = TypeVar("R")

Action = Callable[[sqlite3.Connection], R]
"""Reads or writes within a transaction of the journal's thread. It must not begin or end a transaction itself."""

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
"""Each raises the schema by one version (``PRAGMA user_version``). A released migration never changes."""

_TOGETHER = 64
"""Number of actions that are committed together at most."""

log = structlog.get_logger(__name__)


class _Damaged(sqlite3.DatabaseError):
    """A database that can be opened, but is damaged or not a journal of this service."""


@dataclass(frozen=True, eq=False)
class _Submission(Generic[R]):
    action: Action[R]
    future: Future[R]


class Journal:
    """The database and its thread.

    A file that is damaged, or is not a journal, is set aside and replaced by a new one.

    Args:
        file: made if it does not exist; no other process may use it.
        committed: called in the journal's thread after each commit, with the connection.
        metrics: counts commits; None: not counted.

    Attributes:
        pulse: the pulse of the thread; beats once for each transaction.

    Raises:
        WrittenByNewerRelease: a newer release wrote the file, which stays unchanged.
        OSError: the file cannot be opened or written.
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
        self._queue: SimpleQueue[_Submission[Any] | None] = SimpleQueue()
        self.pulse = Pulse()
        self._thread = threading.Thread(target=self._run, name="vflow-journal", daemon=True)
        self._thread.start()

    def submit(self, action: Action[R]) -> Future[R]:
        """Submit an action, from any thread.

        The future is done when the action's transaction is on the disk. It raises the exception of the action, which
        then changed nothing, or STORAGE_FAILED. An action whose future is cancelled before it starts is never run.
        """
        submission = _Submission(action, Future())
        self._queue.put(submission)
        return submission.future

    def close(self) -> None:
        """Run the actions that were submitted, and end the thread. No action may be submitted after that."""
        self._queue.put(None)
        self._thread.join()
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()

    def _run(self) -> None:
        self.pulse.begin()
        going = True
        while going:
            self.pulse.rest()
            batch = [self._queue.get()]
            self.pulse.beat()
            while len(batch) < _TOGETHER and not self._queue.empty():
                batch.append(self._queue.get())
            going = None not in batch
            self._commit([each for each in batch if each and each.future.set_running_or_notify_cancel()])

    def _commit(self, batch: Sequence[_Submission[Any]]) -> None:
        outcomes: list[tuple[Any, BaseException | None]] = []
        begun = time.perf_counter()
        try:
            if _identity(self._file) != self._identity:
                raise OSError(f"{self._file} was deleted or replaced; restart the service")
            # Not IMMEDIATE: there is no other writer, and reads must work even if the disk cannot be written.
            self._connection.execute("BEGIN")
            outcomes = [self._attempt(submission) for submission in batch]
            self._connection.execute("COMMIT")
        except Exception as error:
            with suppress(sqlite3.Error):
                self._connection.rollback()
            outcomes = [(None, error)] * len(batch)
            self._metrics.commit_failed()
        else:
            self._metrics.committed(time.perf_counter() - begun)
            self._after_commit()
        for submission, (result, failure) in zip(batch, outcomes, strict=True):
            if failure is None:
                submission.future.set_result(result)
            else:
                submission.future.set_exception(_as_raised(failure))

    def _attempt(self, submission: _Submission[Any]) -> tuple[Any, BaseException | None]:
        self._connection.execute("SAVEPOINT action")
        try:
            result = submission.action(self._connection)
        except Exception as error:
            if not self._connection.in_transaction:  # SQLite rolled back all of it, as on a full disk
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
            log.exception("cleaning up after a commit failed")


def _open(file: Path) -> sqlite3.Connection:
    # SQLite would make the file with the rights of the umask. The files that it adds beside it get the same rights.
    with suppress(OSError):  # SQLite reports what is wrong
        os.close(os.open(file, os.O_RDONLY | os.O_CREAT, 0o600))
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=0)
    try:
        _check_ours(connection, file)
        # FULL: acknowledged writes survive a crash of the machine, not only of the process.
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
    """Check the file before anything is written: a foreign database, or a newer one, stays unchanged."""
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


def _as_raised(failure: BaseException) -> BaseException:
    """The exception that the future of a failed action raises."""
    if not isinstance(failure, sqlite3.Error | OSError):
        return failure
    log.error("the data folder cannot be used", because=str(failure))
    refusal = storage_failed(failure)
    refusal.__cause__ = failure
    return refusal
