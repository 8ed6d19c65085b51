"""The path of a picture as people write it: file addresses, names in another Unicode form, typing errors."""

import difflib
import errno
import mimetypes
import os
import re
import unicodedata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

_LONGEST = 1024
"""Characters of a text that may be the name of a file."""


def to_path(name: str | os.PathLike[str]) -> Path:
    """The path that `name` stands for: a path, or the address of a file on this machine (`file:///...`).

    Where no such file exists, but one whose name only differs in its Unicode form (as between macOS and others), it is
    that one.

    Raises:
        ValueError: `name` is the address of something that is no file of this machine.
    """
    if isinstance(name, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        name = _path_of_address(name)
    elif isinstance(name, str) and name.startswith("data:image/"):
        raise ValueError("a data: address is no path: pass the bytes that base64.b64decode() makes of its last part")
    path = Path(name)
    if not os.path.lexists(path):
        for form in ("NFC", "NFD"):
            other = Path(unicodedata.normalize(form, str(path)))
            if os.path.lexists(other):
                return other
    return path


def read_picture(name: str | os.PathLike[str]) -> bytes:
    """The bytes of the file `name`; see `to_path`.

    Raises:
        OSError: it cannot be read; for a missing file the message suggests others that have similar names.
        ValueError: see `to_path`.
    """
    path = to_path(name)
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        similar = _similar(path)
        if not similar:
            raise
        suggestion = f"{os.strerror(errno.ENOENT)}; did you mean {similar!r}?"
        raise FileNotFoundError(errno.ENOENT, suggestion, str(path)) from error
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"{str(name)!r} is no name of a file: {error}") from error


def names_picture(text: str) -> bool:
    """Whether `text` is nothing but the name of a picture's file that exists here."""
    if len(text) > _LONGEST or "\n" in text or not _is_picture_name(text):
        return False
    try:
        return to_path(os.path.expanduser(text.strip())).is_file()
    except (OSError, ValueError):
        return False


def _is_picture_name(text: str) -> bool:
    kind, _ = mimetypes.guess_type(text.strip())
    return kind is not None and kind.startswith("image/")


def _path_of_address(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme.lower() in ("http", "https"):
        raise ValueError(f"{address} is not fetched: download it, and give the path of the file or its bytes")
    if parts.scheme.lower() != "file":
        raise ValueError(f"{address} is no address of a file: give its path, or file:///...")
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError(f"{address} is a file of another machine: copy it here first")
    # What follows ? or # belongs to the name: people do not quote them.
    rest = address.partition("://")[2]
    return url2pathname(rest[len(parts.netloc) :])


def _similar(path: Path) -> str | None:
    """A file beside `path` whose name is similar; None if there is none, or too much to look through."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry, _ in zip(entries, range(1000), strict=False)]
    except OSError:
        return None
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(path.name.casefold(), folded, n=1, cutoff=0.75)
    return str(path.with_name(folded[close[0]])) if close else None
