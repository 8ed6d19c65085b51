"""Files that survive a crash: replaced as a whole, checked for their schema, and quarantined when damaged."""

from __future__ import annotations

import os
import time
from pathlib import Path

import structlog


def make_folder(folder: Path) -> None:
    """Make ``folder``, for its owner alone, where there is none; its name is on the disk when this returns.

    Raises:
        OSError: it cannot be made.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in missing:
        _flush(each.parent)


def replace_file(file: Path, content: str | bytes) -> None:
    """Write ``content`` to ``file`` as a whole, for its owner alone; its folder is made where there is none.

    When this returns both the content and the name are on the disk.

    Raises:
        OSError: it cannot be written; the old file is as it was, or the new one is there as a whole.
    """
    make_folder(file.parent)
    draft = file.with_name(f"{file.name}.new")
    try:
        draft.unlink(missing_ok=True)  # one that a crash left may be open to others
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
    """Have the names in ``folder`` on the disk: until then a crash may undo that a file was made, or replaced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FOLDER = "quarantine"
"""Beside the file that is moved, the folder that it is moved to."""

log = structlog.get_logger(__name__)


class WrittenByNewerRelease(ValueError):
    """A file that is sound, but that this release cannot read and must not touch.

    Args:
        file: which.
        schema: the version that it is written in.
        known: the latest version that this release knows.
    """

    def __init__(self, file: Path, schema: object, known: int) -> None:
        super().__init__(
            f"{file} was written by a newer release (schema {schema}, this one knows {known}); start that release, or "
            "move the file away"
        )


def check_schema(file: Path, schema: object, known: int) -> None:
    """Refuse what ``file`` holds where it is not of the ``known`` schema.

    Raises:
        WrittenByNewerRelease: it is of a later one.
        ValueError: it is of none.
    """
    if isinstance(schema, int) and schema > known:
        raise WrittenByNewerRelease(file, schema, known)
    if schema != known:
        raise ValueError(f"its schema is {schema!r}, expected {known}")


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
