"""The archive: stores sessions in the data folder, their logs in a journal and their pictures in files.

The journal is valid after a crash at any point: a picture's file is written before an entry names it, and deleted after
the last such entry, as :mod:`vflow_server.store.picture_folder` explains. :mod:`vflow_server.store.session_record`
defines the content of the records.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TypeVar

from vflow_server.rpc.errors import CapacityExhausted
from vflow_server.store.files import FOLDER
from vflow_server.store.folder_lock import FolderLock
from vflow_server.store.journal import Action, Journal
from vflow_server.store.picture_folder import PictureFolder
from vflow_server.telemetry.metrics import Metrics
from vflowopt.compression.pipeline import CompressedImage

R = TypeVar("R")

JOURNAL, PICTURES = "sessions.sqlite3", "pictures"
"""Names in the folder: the journal, and the folder of pictures."""

_LOG_BYTES = 4 << 20
"""Size at which the journal's write-ahead log is emptied; in a small folder, an eighth of its bound."""

_LAST_PART = 8
"""One in so many bytes of the bound is left to tenants with less than an equal share."""


class Archive:
    """Stores records of sessions in a folder.

    Args:
        lock: the folder, which stays locked until this is closed; the caller unlocks it.
        most_bytes: bytes of the journal and the pictures at most; beyond that new entries are refused.
        metrics: counts commits; None: not counted.

    Attributes:
        pictures: the files of pictures; for the archive's thread only.
        pulse: the pulse of the journal's thread.
        room: bytes that were left of the bound when it was last measured, for caches. May be read by any thread.

    Raises:
        WrittenByNewerRelease: a newer release wrote the journal, which stays unchanged.
        OSError: the folder cannot be used.
        ServiceError: STORAGE_FAILED.
    """

    def __init__(self, lock: FolderLock, most_bytes: int, metrics: Metrics | None = None) -> None:
        self._lock = lock
        self._most_bytes = most_bytes
        self._log_bytes = min(_LOG_BYTES, most_bytes // 8)
        self.room = 0
        # Keys of pictures whose rows were inserted or deleted, and whose files are still drafts.
        self._unsettled: set[str] = set()
        self.pictures = PictureFolder(lock.folder / PICTURES, lock.folder / FOLDER)
        self._journal = Journal(
            lock.folder / JOURNAL, check=self._check, settle=self._settle, log_bytes=self._log_bytes, metrics=metrics
        )
        try:
            self.pulse = self._journal.pulse
            self.submit(self._recover).result()
        except BaseException:
            self._journal.close()
            raise

    def submit(self, action: Action[R]) -> Future[R]:
        """Run ``action`` within a transaction; see :meth:`Journal.submit`."""
        return self._journal.submit(action)

    def put(self, connection: sqlite3.Connection, tenant: str, image: CompressedImage) -> str:
        """Store ``image`` of ``tenant`` in a file; returns its key. Call this in the transaction whose entry names it.

        Raises:
            CapacityExhausted: the folder has no room for it.
            OSError: the file cannot be written.
        """
        key, size = self.pictures.key(image)
        named = connection.execute("SELECT 1 FROM pictures WHERE key = ?", (key,)).fetchone() is not None
        if not named:
            self.check_room(connection, size, tenant=tenant)
            connection.execute("INSERT INTO pictures (key, bytes) VALUES (?, ?)", (key, size))
        self._unsettled.add(key)
        self.pictures.write(image, named=named)
        return key

    def let_go(self, connection: sqlite3.Connection, keys: Iterable[str]) -> None:
        """Delete the pictures of ``keys`` that no entry names. Call this in the transaction that deleted entries.

        Raises:
            OSError: their files cannot be renamed.
        """
        self._journal.erase()
        gone = [
            key
            for key in keys
            if connection.execute(
                "DELETE FROM pictures WHERE key = ? AND key NOT IN (SELECT picture FROM shown)", (key,)
            ).rowcount
        ]
        if gone:
            self._unsettled.update(gone)
            self.pictures.withdraw(gone)

    def check_room(self, connection: sqlite3.Connection, more: int = 0, *, tenant: str | None = None) -> None:
        """Check that the folder may grow. Its last part is left to tenants with less than an equal share.

        Args:
            connection: the journal, with all that was written in the present transaction.
            more: bytes that are to be written yet.
            tenant: the tenant that writes; None: nobody in particular.

        Raises:
            CapacityExhausted: the folder exceeds its bound, or would.
        """
        left = self._most_bytes - self._measure(connection) - more
        if left < 0 or (
            tenant is not None and left < self._most_bytes // _LAST_PART and self._exceeds_share(connection, tenant)
        ):
            raise CapacityExhausted(
                "data",
                f"the data folder may hold {self._most_bytes} bytes of sessions and would hold more; delete sessions, "
                "retry when idle ones have expired, or start the server with a larger --data-bytes",
                metadata={"max_bytes": self._most_bytes},
                retry_after=10.0,
            )

    def _exceeds_share(self, connection: sqlite3.Connection, tenant: str) -> bool:
        """Whether ``tenant`` has more than an equal share of the folder, which it shares with others."""
        (tenants,) = connection.execute("SELECT count(DISTINCT tenant) FROM sessions").fetchone()
        if tenants < 2:
            return False
        (pictures,) = connection.execute(
            "SELECT coalesce(sum(bytes), 0) FROM pictures "
            "WHERE key IN (SELECT picture FROM shown JOIN sessions ON name = session WHERE tenant = ?)",
            (tenant,),
        ).fetchone()
        (entries,) = connection.execute(
            "SELECT coalesce(sum(length(items)), 0) FROM entries JOIN sessions ON name = session WHERE tenant = ?",
            (tenant,),
        ).fetchone()
        return bool((pictures + entries) * tenants > self._most_bytes)

    def close(self) -> None:
        """Run the actions that were submitted. The folder stays locked."""
        self._journal.close()

    def _check(self) -> None:
        self._lock.check()
        self.pictures.check()

    def _settle(self, connection: sqlite3.Connection, certain: bool) -> None:
        """Settle the files of pictures whose entries were committed, or not."""
        if not certain:
            return
        for key in list(self._unsettled):
            named = connection.execute("SELECT 1 FROM pictures WHERE key = ?", (key,)).fetchone() is not None
            self.pictures.settle(key, named=named)
            self._unsettled.remove(key)

    def _measure(self, connection: sqlite3.Connection) -> int:
        """Bytes of the pictures, and of the journal with its log when that is largest."""
        (pictures,) = connection.execute("SELECT coalesce(sum(bytes), 0) FROM pictures").fetchone()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        held: int = pictures + (pages - free) * page_bytes + self._log_bytes
        self.room = max(self._most_bytes - held, 0)
        return held

    def _recover(self, connection: sqlite3.Connection) -> None:
        self._measure(connection)
        keys = {key for (key,) in connection.execute("SELECT key FROM pictures")}
        self.pictures.recover(keys, journal_is_new=self._journal.new, most_bytes=self._most_bytes)
