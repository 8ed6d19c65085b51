"""Files that survive a crash: replaced as a whole, checked for their schema, and quarantined when damaged."""

from __future__ import annotations

import os
import time
from pathlib import Path

import structlog


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its missing parents, for their owner alone. Their names are on the disk when this returns.

    Raises:
        OSError: the folder cannot be made.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in missing:
        _flush(each.parent)


def replace_file(file: Path, content: str | bytes) -> None:
    """Replace the content of ``file`` atomically; only its owner can read it. A missing folder is made.

    The content and the name are on the disk when this returns.

    Raises:
        OSError: the file cannot be written; it holds the complete old content, or the complete new one.
    """
    make_folder(file.parent)
    draft = file.with_name(f"{file.name}.new")
    try:
        draft.unlink(missing_ok=True)  # a draft that a crash left may be readable by others
        with open(draft, "wb", opener=_private) as handle:
            handle.write(content if isinstance(content, bytes) else content.encode())
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _flush(file.parent)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _flush(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk. Before that a crash may undo the creation or replacement of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FOLDER = "quarantine"
"""Name of the folder that a damaged file is moved to, beside the file."""

log = structlog.get_logger(__name__)


class WrittenByNewerRelease(ValueError):
    """A file of a newer release, which this release cannot read and must not change.

    Args:
        file: the file.
        schema: its schema version.
        known: the latest schema version that this release knows.
    """

    def __init__(self, file: Path, schema: object, known: int) -> None:
        super().__init__(
            f"{file} was written by a newer release (schema {schema}, this one knows {known}); start that release, or "
            "move the file away"
        )


def check_schema(file: Path, schema: object, known: int) -> None:
    """Check that the content of ``file`` has the ``known`` schema version.

    Raises:
        WrittenByNewerRelease: it has a later one.
        ValueError: it has none, or an earlier one.
    """
    if isinstance(schema, int) and schema > known:
        raise WrittenByNewerRelease(file, schema, known)
    if schema != known:
        raise ValueError(f"its schema is {schema!r}, expected {known}")


def set_aside(file: Path, because: object) -> None:
    """Move ``file`` into the quarantine beside it.

    Args:
        file: the damaged file; if it is missing, that is logged.
        because: what is wrong with it, for the log.

    Raises:
        OSError: the file cannot be moved.
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
