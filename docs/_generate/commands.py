"""The reference of the command line: what `vflow --help` and the help of each command print."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from unittest import mock

from vflow_server.cli import main
from vflow_server.settings import ENVIRONMENT_PREFIX

COLUMNS = 100
"""Width that the help is wrapped at."""


def page() -> str:
    """The Markdown page."""
    lines = ["# Command line", "", "The distribution `vflowopt` installs the command `vflow`.", ""]
    for command, text in _helps(()):
        lines += [f"## vflow {' '.join(command)}".rstrip(), "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines)


def _helps(command: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The help of a command and of all below it, from the top."""
    text = _help(command)
    yield command, text
    if below := re.search(r"\{([a-z,-]+)\} \.\.\.", " ".join(text.split())):
        for name in below[1].split(","):
            yield from _helps((*command, name))


def _help(command: tuple[str, ...]) -> str:
    out = io.StringIO()
    # Some defaults come from the environment, and Python 3.14 colours what it prints to a terminal.
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    with mock.patch.dict(os.environ, quiet | {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}, clear=True):
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    return out.getvalue()
