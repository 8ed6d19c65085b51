"""Quarantine: what is damaged or of somebody else is moved out of the way, never deleted, and the log says so."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

FOLDER = "quarantine"
"""Beside the file that is moved, the folder that it is moved to."""

log = structlog.get_logger(__name__)


def set_aside(file: Path, because: object) -> None:
    """Move ``file`` into the quarantine beside it.

    Args:
        file: what cannot be used; nothing happens where it is not there any more.
        because: what is wrong with it, for the log.

    Raises:
        OSError: it cannot be moved.
    """
    folder = file.parent / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    place = folder / f"{time.time_ns()}-{file.name}"
    try:
        file.rename(place)
    except FileNotFoundError:
        log.error("a file is gone", file=str(file), because=str(because))
        return
    log.error("a file cannot be used and was set aside", file=str(file), moved_to=str(place), because=str(because))
