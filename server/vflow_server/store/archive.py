"""The archive: stores sessions in the data folder, their logs in a journal and their pictures in files.

The journal is valid after a crash at any point: a picture's file is written before an entry names it, and deleted after
the last such entry. :mod:`vflow_server.store.session_record` defines the content of the records.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from vflow_server.rpc.errors import CapacityExhausted
from vflow_server.store.folder_lock import lock_data
from vflow_server.store.journal import Action, Journal
from vflow_server.store.picture_folder import PictureFolder
from vflow_server.telemetry.metrics import Metrics
from vflowopt.compression.pipeline import CompressedImage

R = TypeVar("R")

JOURNAL, PICTURES = "sessions.sqlite3", "pictures"
"""Names in the folder: the journal, and the folder of pictures."""


class Archive:
    """Stores records of sessions in a folder.

    Args:
        folder: made if it does not exist; no other process may use it meanwhile.
        most_bytes: bytes of the journal and the pictures at most; beyond that new entries are refused.
        metrics: counts commits; None: not counted.

    Attributes:
        pictures: the files of pictures; for the archive's thread only.
        pulse: the pulse of the journal's thread.
        room: bytes that were left of the bound when it was last measured, for caches. May be read by any thread.

    Raises:
        WrittenByNewerRelease: a newer release wrote the journal, which stays unchanged.
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: Path, most_bytes: int, metrics: Metrics | None = None) -> None:
        self._lock = lock_data(folder)
        self._most_bytes = most_bytes
        self.room = 0
        # What the current transaction leaves to do after its commit.
        self._deleted = False
        self._unwanted: set[str] = set()
        try:
            self.pictures = PictureFolder(folder / PICTURES)
            self._journal = Journal(folder / JOURNAL, self._committed, metrics)
            self.pulse = self._journal.pulse
        except BaseException:
            self._lock.close()
            raise
        self.submit(self._sweep).result()

    def submit(self, action: Action[R]) -> Future[R]:
        """Run ``action`` within a transaction; see :meth:`Journal.submit`."""
        return self._journal.submit(action)

    def put(self, connection: sqlite3.Connection, image: CompressedImage) -> str:
        """Store ``image`` in a file, and return its key. Call this in the transaction whose entry names the key.

        Raises:
            OSError: the file cannot be written.
        """
        key, size = self.pictures.write(image)
        connection.execute("INSERT OR IGNORE INTO pictures (key, bytes) VALUES (?, ?)", (key, size))
        return key

    def let_go(self, connection: sqlite3.Connection, keys: Iterable[str]) -> None:
        """Delete the pictures of ``keys`` that no entry names. Call this in the transaction that deleted entries."""
        self._deleted = True
        for key in keys:
            gone = connection.execute(
                "DELETE FROM pictures WHERE key = ? AND key NOT IN (SELECT picture FROM shown)", (key,)
            )
            if gone.rowcount:
                self._unwanted.add(key)

    def check_room(self, connection: sqlite3.Connection) -> None:
        """Check that the folder may grow.

        Raises:
            CapacityExhausted: the folder exceeds its bound.
        """
        if (held := self._measure(connection)) > self._most_bytes:
            raise CapacityExhausted(
                "data",
                f"the data folder holds {held} bytes of sessions, and may hold {self._most_bytes}; delete sessions, "
                "retry when idle ones have expired, or start the server with a larger --data-bytes",
                metadata={"bytes": held, "max_bytes": self._most_bytes},
                retry_after=10.0,
            )

    def close(self) -> None:
        """Run the actions that were submitted, and unlock the folder."""
        self._journal.close()
        self._lock.close()

    def _committed(self, connection: sqlite3.Connection) -> None:
        """Remove deleted data from the disk: files that no committed entry names, and old pages of the journal."""
        if self._deleted:
            self._deleted = False
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        unwanted, self._unwanted = self._unwanted, set()
        for key in unwanted:
            if connection.execute("SELECT 1 FROM pictures WHERE key = ?", (key,)).fetchone() is None:
                self.pictures.remove(key)

    def _measure(self, connection: sqlite3.Connection) -> int:
        """Bytes of the journal and the pictures."""
        (pictures,) = connection.execute("SELECT coalesce(sum(bytes), 0) FROM pictures").fetchone()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        held: int = pictures + (pages - free) * page_bytes
        self.room = max(self._most_bytes - held, 0)
        return held

    def _sweep(self, connection: sqlite3.Connection) -> None:
        self._measure(connection)
        self.pictures.sweep({key for (key,) in connection.execute("SELECT key FROM pictures")})
