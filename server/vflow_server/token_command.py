"""``vflow token``: creates a token for a caller."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vflow_server.access.caller import DEFAULT_TENANT, Caller, is_tenant
from vflow_server.access.tokens import ROLES, new_token
from vflow_server.option import OptionError, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    parser.add_argument(
        "tenant",
        nargs="?",
        default=DEFAULT_TENANT,
        metavar="TENANT",
        help="tenant whose sessions and pictures the token gives access to (default: %(default)s)",
    )
    parser.add_argument("--role", choices=ROLES, default=ROLES[0], help="what the token allows (default: %(default)s)")
    parser.add_argument(
        "--expires", metavar="TIME", help="how long the token is valid, such as 90d (default: without end)"
    )
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="append the line to this file and print only the token"
    )


def run(arguments: argparse.Namespace) -> int:
    """Create a token for the parsed ``arguments`` and print it; returns the exit code.

    Raises:
        OptionError: an argument is not valid, or the file cannot be written.
    """
    if not is_tenant(arguments.tenant):
        raise OptionError(
            f"the tenant is {arguments.tenant!r}: expected 1 to 63 lower-case letters, digits and hyphens"
        )
    expires = None
    if arguments.expires is not None:
        try:
            expires = datetime.now(UTC) + timedelta(seconds=seconds(arguments.expires))
        except (ValueError, OverflowError) as error:
            raise OptionError(f"--expires is {arguments.expires!r}: {error}") from None
    token, entry = new_token(Caller(arguments.tenant, admin=arguments.role == "admin"), expires)
    if arguments.into is None:
        print(f"for the caller, who alone should ever see it (VFLOW_TOKEN):\n{token}")
        print(f"for the file of --tokens:\n{entry.line()}")
    else:
        _append(arguments.into, entry.line())
        print(token)
    return 0


def _append(file: Path, line: str) -> None:
    """Append ``line`` on a line of its own: all of it, or nothing. It is on the disk when this returns."""
    try:
        is_new = not file.exists()
        with open(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b", buffering=0) as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)  # one line after the other
            end = opened.seek(0, os.SEEK_END)
            opened.seek(max(end - 1, 0))
            content = f"{line}\n".encode()
            if opened.read(1) not in (b"", b"\n"):
                content = b"\n" + content  # otherwise it would belong to the last line
            try:
                if opened.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(opened.fileno())
            except OSError:
                os.ftruncate(opened.fileno(), end)
                raise
        if is_new:
            _flush_folder(file.parent)
    except OSError as error:
        raise OptionError(f"{file} cannot be written: {error.strerror}") from None


def _flush_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
