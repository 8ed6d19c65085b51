"""Recovery: which sessions an archive holds when the service starts. What they said is read when it is needed."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from vflow_server.store.archive import Archive
from vflow_server.store.session_record import SessionFacts, SessionRecord


@dataclass(frozen=True)
class Recovered:
    """A session of an earlier process.

    Attributes:
        record: what is stored of it.
        used: Unix time in seconds of the end of its last turn or picture.
        turns: finished.
        images: shown.
    """

    record: SessionRecord
    used: float
    turns: int
    images: int


def recover(archive: Archive) -> list[Recovered]:
    """All sessions that ``archive`` holds, oldest first.

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
            Recovered(SessionRecord(SessionFacts(*facts), archive, entries), used, turns, images)
            for *facts, used, entries, turns, images in rows
        ]

    return archive.submit(sessions).result()
