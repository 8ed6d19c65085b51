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
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import structlog

from vflow_server.rpc.errors import storage_failed
from vflow_server.store.files import WrittenByNewerRelease, set_aside
from vflow_server.store.folder_lock import file_identity
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

_IDLE = 0.2
"""Seconds without an action after which the write-ahead log is copied to the main file."""

_HEADER = 100
"""Bytes of the header of a database."""

_Identities = tuple[tuple[int, int] | None, ...]
"""Of the main file, the write-ahead log, and the index of the log, which processes share."""

log = structlog.get_logger(__name__)


class _Damaged(sqlite3.DatabaseError):
    """A database that can be opened, but is damaged or not a journal of this service."""


@dataclass(frozen=True, eq=False)
class _Submission(Generic[R]):
    action: Action[R]
    future: Future[R]


class Journal:
    """The database and its thread.

    A file that is damaged, or is not a journal, is set aside and replaced by a new one. The database is in two files
    beside each other, its main file and its write-ahead log. What is committed is written to the log, and copied from
    there to the main file whenever the journal has been idle for a moment.

    Args:
        file: made if it does not exist; no other process may use it.
        check: called in the journal's thread before and after each commit; raises OSError if nothing may be stored.
        settle: called in the journal's thread after each commit that was made or failed, with the connection, and
            whether it is certain that the disk has what the connection has. It is not after a flush that failed: a
            crash may bring back what was rolled back.
        log_bytes: the write-ahead log is copied to the main file when it exceeds this.
        metrics: counts commits; None: not counted.

    Attributes:
        file: the main file.
        new: whether there was no journal, or none that can be used.
        pulse: the pulse of the thread; beats once for each transaction.

    Raises:
        WrittenByNewerRelease: a newer release wrote the file, which stays unchanged.
        OSError: the file cannot be opened or written.
    """

    def __init__(
        self,
        file: Path,
        *,
        check: Callable[[], None] = lambda: None,
        settle: Callable[[sqlite3.Connection, bool], None] = lambda connection, certain: None,
        log_bytes: int = 4 << 20,
        metrics: Metrics | None = None,
    ) -> None:
        self.file = file
        self._log, self._shared = (file.with_name(file.name + part) for part in ("-wal", "-shm"))
        self._check = check
        self._settle = settle
        self._log_bytes = log_bytes
        self._metrics = metrics or Metrics()
        self._certain = True
        self._behind = False  # whether the main file may lack commits
        self._erase = False
        self._closed = False
        try:
            self.new = not _holds_something(file)
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            if not _damaged(error):
                raise OSError(f"{file} cannot be opened or written ({error}); check its rights, and room") from error
            set_aside(file, self._log, self._shared, file.with_name(f"{file.name}-journal"), because=error)
            self.new = True
            self._connection = self._open()
        self._identities = self._found()
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

    def erase(self) -> None:
        """Have what was deleted overwritten on the disk before the present transaction is acknowledged.

        Call this in an action.
        """
        self._erase = True

    def close(self) -> None:
        """Run the actions that were submitted, and end the thread. No action may be submitted after that."""
        self._queue.put(None)
        self._thread.join()
        with suppress(sqlite3.Error, OSError):
            self._check_files()
            self._empty_log()
        self._connection.close()

    def _run(self) -> None:
        self.pulse.begin()
        going = True
        while going:
            self.pulse.rest()
            try:
                batch = [self._queue.get(timeout=_IDLE)]
            except Empty:
                self.pulse.beat()
                self._rest()
                continue
            self.pulse.beat()
            while len(batch) < _TOGETHER and not self._queue.empty():
                batch.append(self._queue.get())
            going = None not in batch
            self._process([each for each in batch if each is not None])

    def _process(self, batch: Sequence[_Submission[Any]]) -> None:
        """Commit ``batch``. Whatever happens, each of its futures ends, and the thread goes on."""
        try:
            self._commit([each for each in batch if _starts(each.future)])
        except BaseException as error:
            for each in batch:
                _end(each.future, None, _as_raised(error))
            with suppress(Exception):
                log.exception("the journal's thread met a fault, and goes on")

    def _commit(self, batch: Sequence[_Submission[Any]]) -> None:
        outcomes: list[tuple[Any, BaseException | None]] = []
        begun = time.perf_counter()
        try:
            self._check_files()
            self._make_certain()
            # Not IMMEDIATE: there is no other writer, and reads must work even if the disk cannot be written.
            self._connection.execute("BEGIN")
            before = self._connection.total_changes
            outcomes = [self._attempt(submission) for submission in batch]
            self._behind |= self._connection.total_changes != before
            self._connection.execute("COMMIT")
            # Not acknowledged before it is certain that the files are still those that a new process would find.
            self._check_files()
        except BaseException as error:  # an open transaction would be in the way of all later ones
            self._roll_back(error)
            outcomes = [(None, error)] * len(batch)
            self._metrics.commit_failed()
        else:
            self._metrics.committed(time.perf_counter() - begun)
        self._settled()
        for submission, (result, failure) in zip(batch, outcomes, strict=True):
            _end(submission.future, result, None if failure is None else _as_raised(failure))

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

    def _settled(self) -> None:
        """Do what is left to do after a transaction; what fails now is tried again after the next one."""
        try:
            self._check_files()
        except OSError:  # whoever waits was told, and nothing may be changed in a folder that is not ours
            return
        try:
            if self._erase:
                self._erase = not self._empty_log()
            self._settle(self._connection, self._certain)
        except (OSError, sqlite3.Error) as error:
            with suppress(Exception):
                log.warning("files of a commit could not be cleaned up yet", because=str(error))
        except Exception:
            with suppress(Exception):
                log.exception("cleaning up after a commit failed")

    def _rest(self) -> None:
        """Bring the main file up to date while there is nothing else to do."""
        try:
            self._check_files()
            self._make_certain()
            if self._behind or self._erase:
                self._erase &= not self._empty_log()
        except Exception as error:
            # The next action is told so. Until then this is tried again.
            with suppress(Exception):
                log.debug("the journal cannot be brought up to date", because=str(error))

    def _empty_log(self) -> bool:
        """Copy the write-ahead log to the main file, and empty it. False if a reader, such as a backup, prevents it.

        Raises:
            sqlite3.Error: a file cannot be written.
        """
        (busy, *_) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._behind &= bool(busy)
        return not busy

    def _roll_back(self, error: BaseException) -> None:
        with suppress(sqlite3.Error):
            self._connection.rollback()
        # After a flush that failed, the whole transaction may be in the log even so, and a crash would bring it back.
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_FSYNC:
            self._certain = False

    def _make_certain(self) -> None:
        """Overwrite what a failed transaction left in the log, by writing something that changes nothing."""
        if self._certain:
            return
        with suppress(sqlite3.Error):
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            self._connection.execute(f"PRAGMA user_version={version}")
            self._certain = self._behind = True

    def _check_files(self) -> None:
        """Check that the files that are open are those that a new process would find.

        If another one would find the main file without its log, all commits are copied to it, and a new log is begun.

        Raises:
            OSError: nothing may be stored; or the main file is not the one that is open, or cannot be written.
        """
        self._check()
        found = self._found()
        if found == self._identities and not self._closed:
            return
        if found[0] != self._identities[0]:
            raise OSError(f"{self.file} was deleted or replaced; restart the service")
        try:
            self._begin_new_log(found)
        except sqlite3.Error as error:
            raise OSError(
                f"the log of {self.file} was deleted or replaced, and cannot be made anew ({error})"
            ) from error
        log.error("the journal's log was deleted or replaced; all commits were saved", file=str(self.file))

    def _begin_new_log(self, found: _Identities) -> None:
        if not self._closed:
            if not self._empty_log():
                raise OSError(f"the log of {self.file} was deleted or replaced, and a reader prevents its repair")
            # A log of another database must not be read into this one.
            pairs = zip(self._files(), found, self._identities, strict=True)
            if foreign := [path for path, now, ours in pairs if now not in (None, ours)]:
                set_aside(*foreign, because="it is not the one that the service uses")
            self._connection.close()
            self._closed = True
        self._connection = self._open()
        self._closed = False
        self._identities = self._found()

    def _files(self) -> tuple[Path, Path, Path]:
        return self.file, self._log, self._shared

    def _found(self) -> _Identities:
        return tuple(map(file_identity, self._files()))

    def _open(self) -> sqlite3.Connection:
        connection = _open(self.file)
        try:
            (page,) = connection.execute("PRAGMA page_size").fetchone()
            connection.execute(f"PRAGMA wal_autocheckpoint={max(self._log_bytes // page, 1)}")
            connection.execute(f"PRAGMA journal_size_limit={self._log_bytes}")
            # Reading opens the log, which is made if there is none.
            connection.execute("SELECT count(*) FROM sessions").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection


def _starts(future: Future[Any]) -> bool:
    """Mark ``future`` as running; False if its caller cancelled or ended it before."""
    return not future.done() and future.set_running_or_notify_cancel()


def _end(future: Future[Any], result: Any, failure: BaseException | None) -> None:
    """End ``future``, unless it has ended: nobody may keep the others of a batch from being told."""
    with suppress(InvalidStateError):
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)


def _open(file: Path) -> sqlite3.Connection:
    if not _holds_something(file) and _holds_something(file.with_name(f"{file.name}-wal")):
        # SQLite would delete the log.
        raise _Damaged("the write-ahead log is there without its database")
    _check_header(file)
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


def _holds_something(file: Path) -> bool:
    """Whether ``file`` is there and not empty."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return file.stat().st_size > 0
    return False


def _check_header(file: Path) -> None:
    """Check the part of the header for which SQLite would take the database for one that is read-only.

    Raises:
        _Damaged: the header is not one that this service writes.
    """
    if _holds_something(file.with_name(f"{file.name}-journal")):
        return  # a crash while the database was made; SQLite undoes what was written of it
    with suppress(OSError), file.open("rb") as database:  # SQLite reports what is wrong
        header = database.read(_HEADER)
        if header and (len(header) < _HEADER or header[18:20] not in (b"\1\1", b"\2\2")):
            raise _Damaged("the header of the database is damaged")


def _check_ours(connection: sqlite3.Connection, file: Path) -> None:
    """Check the file before anything is written: a foreign database, or a newer one, stays unchanged."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION and (application or tables):
        raise _Damaged("it is not a journal of this service")
    if version < 0 or (version == 0) != (tables == 0):
        raise _Damaged(f"its schema is {version}, with {tables} tables and indices")
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
    """Whether ``error`` is due to the content of the file, and not to its rights, its disk or its other users."""
    if isinstance(error, _Damaged):
        return True
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


def _as_raised(failure: BaseException) -> BaseException:
    """The exception that the future of a failed action raises."""
    if isinstance(failure, Exception) and not isinstance(failure, sqlite3.Error | OSError):
        return failure  # any other kind, such as SystemExit, would end those who wait
    with suppress(Exception):
        log.error("the data folder cannot be used", because=str(failure))
    refusal = storage_failed(failure)
    refusal.__cause__ = failure
    return refusal
