"""The reference of the command line: what `vflow --help` and the help of each command print."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from unittest import mock

from vflow_server.cli import command_parser
from vflow_server.settings import ENVIRONMENT_PREFIX

COLUMNS = 100
"""Width that the help is wrapped at."""


def page() -> str:
    """The Markdown page."""
    lines = ["# Command line", "", "The distribution `vflowopt` installs the command `vflow`.", ""]
    # Some defaults come from the environment, and Python 3.14 colours help.
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    with mock.patch.dict(os.environ, quiet | {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}, clear=True):
        for parser in _parsers(command_parser()):
            lines += [f"## {parser.prog}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of the commands below it, from the top."""
    yield parser
    for action in parser._actions:  # argparse has no public way to its commands
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _parsers(below)
