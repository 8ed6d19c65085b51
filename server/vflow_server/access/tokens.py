"""Bearer tokens. A line is stored of each: its hash, its tenant, its role, and the time of its expiry.

    sha256=9f86d0... tenant=acme role=admin expires=2027-01-31T00:00:00+00:00  # the nightly search

A token is 32 random bytes, so a plain SHA-256 is enough: there are no likely tokens that an attacker could try.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from vflow_server.access.caller import Caller, is_tenant

ROLES = ("user", "admin")
"""Roles: a user has conversations, an administrator manages the service as well."""

_HASH = re.compile("[0-9a-f]{64}")
_PREFIX = "vflow_"  # lets secret scanners recognize a leaked token


log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TokenEntry:
    """The stored entry of a token.

    Attributes:
        digest: SHA-256 of the token.
        caller: the caller that it belongs to.
        expires: when it expires; None: never.
    """

    digest: bytes
    caller: Caller
    expires: datetime | None = None

    def expired(self, now: datetime) -> bool:
        """Whether the token has expired at ``now``."""
        return self.expires is not None and now >= self.expires

    def line(self) -> str:
        """The entry as a line that :func:`read_tokens` reads."""
        expires = f" expires={self.expires.isoformat(timespec='seconds')}" if self.expires else ""
        role = "admin" if self.caller.admin else "user"
        return f"sha256={self.digest.hex()} tenant={self.caller.tenant} role={role}{expires}"


def new_token(caller: Caller, expires: datetime | None = None) -> tuple[str, TokenEntry]:
    """Create a token for ``caller``; returns the token itself, which is not stored anywhere, and its entry."""
    token = _PREFIX + secrets.token_urlsafe(32)
    return token, TokenEntry(_digest(token), caller, expires)


def find_token(entries: Sequence[TokenEntry], token: str) -> TokenEntry | None:
    """The entry of ``token``, even if expired; None if it is unknown. The time taken does not depend on the result."""
    digest, found = _digest(token), None
    for entry in entries:
        if hmac.compare_digest(entry.digest, digest):
            found = entry
    return found


def entries_or_file(text: str) -> tuple[TokenEntry, ...] | Path:
    """Parse the value of an option: the entries themselves, one a line, or the path of a file with them.

    Raises:
        ValueError: an entry is not valid, or there is nothing.
    """
    if not text.strip():
        raise ValueError("expected a file that lists tokens, or their lines; leave it unset to serve without tokens")
    return read_tokens(text) if text.lstrip().startswith("sha256=") else Path(text)


def read_tokens(text: str) -> tuple[TokenEntry, ...]:
    """The entries in ``text``, one a line; empty lines and comments after a ``#`` are ignored.

    Raises:
        ValueError: a line is not valid, a token is listed twice, or there is none.
    """
    entries, problems = _read(text)
    if problems:
        raise ValueError(problems[0])
    if not entries:
        raise ValueError("no token is listed; `vflow token` makes one")
    return entries


def read_token_file(file: Path) -> tuple[TokenEntry, ...]:
    """The entries that ``file`` lists, as :func:`read_tokens` reads them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not list tokens.
    """
    try:
        return read_tokens(file.read_text())
    except OSError as error:
        raise OSError(f"the tokens file {file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a file that is no text is one, too
        raise ValueError(f"the tokens file {file} cannot be used: {error}") from None


def reread_token_file(file: Path) -> tuple[TokenEntry, ...]:
    """The entries that ``file`` lists now that it has changed while it was in use.

    Whoever takes a line out of the file, or takes the file away, wants the token to be refused from then on. So a token
    is valid only if there is a line for it that can be read: a line that cannot be read counts for nothing, and neither
    does a file that is gone. Both are logged.

    Raises:
        OSError: it cannot be told what the file lists, as when no descriptor is left.
    """
    try:
        text = file.read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        log.error("the tokens file is gone: no token is valid", file=str(file), because=error.strerror)
        return ()
    entries, problems = _read(text)
    for problem in problems:
        log.error("a line of the tokens file counts for nothing", file=str(file), because=problem)
    if not entries:
        log.error("the tokens file lists no token: none is valid", file=str(file))
    return entries


def _read(text: str) -> tuple[tuple[TokenEntry, ...], list[str]]:
    """The entries that are valid, and what is wrong with the other lines."""
    entries: dict[bytes, TokenEntry] = {}
    twice: set[bytes] = set()
    problems = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        if not (written := line.partition("#")[0].strip()):
            continue
        try:
            entry = _entry(written)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if entry.digest in entries:
            problems.append(f"line {number}: a token is listed twice")
            twice.add(entry.digest)  # nobody can tell which of them is meant
        entries[entry.digest] = entry
    return tuple(entry for digest, entry in entries.items() if digest not in twice), problems


def _entry(line: str) -> TokenEntry:
    pairs = [word.partition("=") for word in line.split()]
    values = {key: value for key, _, value in pairs}
    missing = {"sha256", "tenant", "role"} - values.keys()
    unknown = values.keys() - {"sha256", "tenant", "role", "expires"}
    if missing or unknown or len(pairs) > len(values):
        raise ValueError("expected sha256=... tenant=... role=user|admin, and perhaps expires=..., each once")
    if not _HASH.fullmatch(values["sha256"]):
        raise ValueError("sha256 must be 64 lower-case hexadecimal digits, as `vflow token` prints them")
    if not is_tenant(values["tenant"]):
        raise ValueError(f"tenant is {values['tenant']!r}; expected 1 to 63 lower-case letters, digits and hyphens")
    if values["role"] not in ROLES:
        raise ValueError(f"role is {values['role']!r}; expected one of {', '.join(ROLES)}")
    expires = _time(values["expires"]) if "expires" in values else None
    caller = Caller(values["tenant"], admin=values["role"] == "admin")
    return TokenEntry(bytes.fromhex(values["sha256"]), caller, expires)


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"expires is {text!r}; expected a date such as 2027-01-31, or one with a time") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
