"""A folder of compressed pictures, each in a file that is named by the digest of its content.

So the name is a checksum, and a picture is written only once. Belongs to the journal's thread.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path
from weakref import WeakKeyDictionary

from vflow_server.store.files import make_folder, replace_file, set_aside
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.serialize import PackingError, pack, unpack

_SUFFIX = ".safetensors"
_OURS = re.compile(rf"[0-9a-f]{{64}}\{_SUFFIX}(\.new)?")


class PictureLost(Exception):
    """A picture cannot be read from its file; the message says why."""


class PictureFolder:
    """Compressed pictures in files, by key.

    Args:
        folder: made if it does not exist.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self._folder = folder
        self._known: WeakKeyDictionary[CompressedImage, str] = WeakKeyDictionary()

    def write(self, image: CompressedImage) -> tuple[str, int]:
        """Store ``image`` in a file, which is on the disk when this returns; returns its key and the file's bytes.

        Raises:
            OSError: the file cannot be written.
        """
        if (key := self._known.get(image)) is None or not self._file(key).exists():
            data = pack(image)
            key = hashlib.sha256(data).hexdigest()
            if not self._file(key).exists():
                replace_file(self._file(key), data)
            self._known[image] = key
        return key, self._file(key).stat().st_size

    def read(self, key: str) -> CompressedImage:
        """Read the picture of ``key``. A damaged file is set aside.

        Raises:
            PictureLost: the file is damaged or missing.
            OSError: the file cannot be read.
        """
        file = self._file(key)
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise PictureLost(f"{file} is gone") from error
        try:
            if hashlib.sha256(data).hexdigest() != key:
                raise PackingError("its content is not what was written")
            image = unpack(data)
        except PackingError as error:
            set_aside(file, error)
            raise PictureLost(f"{file} is damaged: {error}") from error
        self._known[image] = key
        return image

    def remove(self, key: str) -> None:
        """Delete the file of ``key``, if there is one."""
        self._file(key).unlink(missing_ok=True)

    def sweep(self, wanted: Collection[str]) -> None:
        """Delete the files of pictures whose keys are not in ``wanted``; a crash may have left some."""
        for file in self._folder.iterdir():
            if _OURS.fullmatch(file.name) and file.name.removesuffix(_SUFFIX) not in wanted:
                file.unlink()

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"
