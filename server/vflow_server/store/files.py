"""Files that survive a crash: replaced as a whole, checked for their schema, and quarantined when damaged."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable
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
        flush_folder(each.parent)


def replace_file(file: Path, content: str | bytes) -> None:
    """Replace the content of ``file`` atomically; only its owner can read it. A missing folder is made.

    The content and the name are on the disk when this returns.

    Raises:
        OSError: the file cannot be written; it holds the complete old content, or the complete new one.
    """
    make_folder(file.parent)
    draft = file.with_name(f"{file.name}.new")
    try:
        write_file(draft, content if isinstance(content, bytes) else content.encode())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush_folder(file.parent)


def write_file(file: Path, content: bytes) -> None:
    """Write ``file`` anew, for its owner alone. Its content is on the disk when this returns, its name may not be.

    Raises:
        OSError: the file cannot be written; a part of it may be there.
    """
    file.unlink(missing_ok=True)  # one that a crash left may be readable by others
    with open(file, "wb", opener=_private) as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def flush_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk. Until then a crash may undo that a file was made, renamed or removed.

    Raises:
        OSError: the folder is missing, or cannot be flushed.
    """
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


def set_aside(*files: Path, because: object, into: Path | None = None) -> None:
    """Move files that belong together into a quarantine, where their names begin with the same time.

    Args:
        files: the files; those that are missing are left out.
        because: what is wrong with them, for the log.
        into: the quarantine; None: the one beside the first file.

    Raises:
        OSError: a file cannot be moved.
    """
    folder = files[0].parent / FOLDER if into is None else into
    make_folder(folder)
    incident, moved = time.time_ns(), []
    for file in files:
        place = folder / f"{incident}-{file.name}"
        try:
            file.rename(place)
        except FileNotFoundError:
            continue
        moved.append(place)
    if not moved:
        log.error("a file is gone", file=str(files[0]), because=str(because))
        return
    for changed in {folder, *(file.parent for file in files)}:
        flush_folder(changed)
    log.error(
        "files cannot be used and were set aside" if len(moved) > 1 else "a file cannot be used and was set aside",
        file=str(files[0]),
        moved_to=str(moved[0]),
        files=len(moved),
        because=str(because),
    )


def bound_quarantine(folder: Path, most_bytes: int) -> None:
    """Delete what was set aside first while the quarantine ``folder`` exceeds a bound. What came last always stays.

    Raises:
        OSError: a file cannot be deleted.
    """
    incidents: defaultdict[str, list[Path]] = defaultdict(list)
    for file in filter(Path.is_file, folder.iterdir() if folder.is_dir() else ()):
        incidents[file.name.partition("-")[0]].append(file)
    sizes = {incident: _bytes_of(files) for incident, files in incidents.items()}
    *earlier, _ = sorted(incidents, key=lambda incident: (len(incident), incident)) or [""]
    for incident in earlier:
        if sum(sizes.values()) <= most_bytes:
            return
        for file in incidents[incident]:
            file.unlink()
        log.error(
            "files that were set aside earlier were deleted, to bound the quarantine",
            folder=str(folder),
            incident=incident,
            files=len(incidents[incident]),
            bytes=sizes.pop(incident),
        )


def _bytes_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
