"""A folder of compressed pictures, each in a file that is named by the digest of its content.

So the name is a checksum, and a picture is written only once. A file has its final name only while a committed entry
names it. Before the commit of an entry that names it first, and before the commit that deletes the last such entry, it
is a draft: then the journal decides, even after a crash, whether the file gets its final name or is deleted. So a file
with its final name that the journal does not name was lost by the journal, and is never deleted.

Belongs to the journal's thread.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import structlog

from vflow_server.store.files import FOLDER, bound_quarantine, flush_folder, make_folder, set_aside, write_file
from vflow_server.store.folder_lock import file_identity
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.serialize import PackingError, pack, unpack

_SUFFIX, _DRAFT = ".safetensors", ".new"
_OURS = re.compile(rf"(?P<key>[0-9a-f]{{64}})\{_SUFFIX}(?P<draft>\{_DRAFT})?")
_ASIDE = re.compile(rf"\d+-(?P<key>[0-9a-f]{{64}})\{_SUFFIX}(\{_DRAFT})?")

log = structlog.get_logger(__name__)


class PictureLost(Exception):
    """A picture cannot be read from its file; the message says why."""


class PictureFolder:
    """Compressed pictures in files, by key.

    Args:
        folder: made if it does not exist.
        quarantine: where files go that no entry names.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, quarantine: Path) -> None:
        make_folder(folder)
        self._folder = folder
        self._quarantine = quarantine
        self._identity = file_identity(folder)
        self._packed: dict[str, bytes] = {}  # what was packed last, and is likely to be written next
        self._known: WeakKeyDictionary[CompressedImage, tuple[str, int]] = WeakKeyDictionary()

    def check(self) -> None:
        """Check that the folder is still there.

        Raises:
            OSError: it was deleted or replaced.
        """
        if file_identity(self._folder) != self._identity:
            raise OSError(f"the folder {self._folder} was deleted or replaced; restart the service")

    def key(self, image: CompressedImage) -> tuple[str, int]:
        """The key of ``image``, and the bytes of its file; nothing is written."""
        if image not in self._known:
            data = pack(image)
            self._known[image] = key, _ = hashlib.sha256(data).hexdigest(), len(data)
            self._packed = {key: data}
        return self._known[image]

    def write(self, image: CompressedImage, *, named: bool) -> None:
        """Have ``image`` on the disk when this returns: as a draft, unless a file has its content already.

        Args:
            image: the picture.
            named: whether a committed entry names it already.

        Raises:
            OSError: the file cannot be written.
        """
        key, size = self.key(image)
        file, draft = self._file(key), self._draft(key)
        if _holds(draft, key, size):
            return
        if _holds(file, key, size):
            if not named:
                self.withdraw([key])
            return
        try:
            write_file(draft, self._packed.pop(key, b"") or pack(image))
            flush_folder(self._folder)
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise

    def withdraw(self, keys: Iterable[str]) -> None:
        """Make drafts of the files of ``keys``. Call this before the commit after which no entry names them.

        Raises:
            OSError: a file cannot be renamed.
        """
        for key in keys:
            with suppress(FileNotFoundError):
                self._file(key).rename(self._draft(key))
        flush_folder(self._folder)

    def settle(self, key: str, *, named: bool) -> None:
        """Give the draft of ``key`` its final name if a committed entry names it now; delete the file otherwise.

        Raises:
            OSError: a file cannot be renamed or deleted.
        """
        file, draft = self._file(key), self._draft(key)
        if named:
            with suppress(FileNotFoundError):
                draft.rename(file)
            return
        draft.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        for aside in self._damaged().glob(f"*-{key}{_SUFFIX}*"):
            aside.unlink()

    def read(self, key: str) -> CompressedImage:
        """Read the picture of ``key``. A damaged file is set aside.

        Raises:
            PictureLost: the file is damaged or missing.
            OSError: the file cannot be read.
        """
        file = self._file(key)
        if not file.exists() and self._draft(key).exists():  # not settled yet
            file = self._draft(key)
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise PictureLost(f"{file} is gone") from error
        try:
            if hashlib.sha256(data).hexdigest() != key:
                raise PackingError("its content is not what was written")
            image = unpack(data)
        except PackingError as error:
            set_aside(file, because=error)
            raise PictureLost(f"{file} is damaged: {error}") from error
        self._known[image] = key, len(data)
        return image

    def recover(self, named: Collection[str], *, journal_is_new: bool, most_bytes: int) -> None:
        """Bring the folder into line with the journal, whatever happened before.

        Drafts are settled. Files that lost their entries go into the quarantine, and those whose entries have come back
        return from it.

        Args:
            named: keys of the pictures that entries name.
            journal_is_new: whether there was no journal; then drafts, too, may have belonged to the one that was.
            most_bytes: bound on the quarantine.

        Raises:
            OSError: a file cannot be renamed or deleted.
        """
        lost: list[Path] = []
        for file in sorted(self._folder.iterdir()):
            if (name := _OURS.fullmatch(file.name)) is None:
                continue
            key = name["key"]
            if key not in named:
                if journal_is_new or not name["draft"]:
                    lost.append(file)
                else:
                    file.unlink()
            elif name["draft"]:
                # Where both are there, the file was damaged, or the draft was not finished.
                if self._file(key).exists() and not _holds(file, key):
                    file.unlink()
                else:
                    file.rename(self._file(key))
        flush_folder(self._folder)
        if lost:
            set_aside(*lost, because="the journal does not name these pictures", into=self._quarantine)
        self._bring_back(named)
        for quarantine in (self._quarantine, self._damaged()):
            bound_quarantine(quarantine, most_bytes)

    def _bring_back(self, named: Collection[str]) -> None:
        """Bring the pictures that entries name and that are missing back from the quarantine."""
        missing = {key for key in named if not self._file(key).exists()}
        if not missing or not self._quarantine.is_dir():
            return
        back = 0
        for aside in sorted(self._quarantine.iterdir(), reverse=True):
            name = _ASIDE.fullmatch(aside.name)
            if name is not None and name["key"] in missing and _holds(aside, name["key"]):
                aside.rename(self._file(name["key"]))
                missing.remove(name["key"])
                back += 1
        if back:
            flush_folder(self._folder)
            flush_folder(self._quarantine)
            log.warning("pictures were brought back from the quarantine", pictures=back, still_missing=len(missing))

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _draft(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}{_DRAFT}"

    def _damaged(self) -> Path:
        """The quarantine of damaged files."""
        return self._folder / FOLDER


def _holds(file: Path, key: str, size: int | None = None) -> bool:
    """Whether ``file`` is there and has the content that ``key`` is the digest of."""
    try:
        if size is not None and file.stat().st_size != size:
            return False
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == key
    except FileNotFoundError:
        return False
