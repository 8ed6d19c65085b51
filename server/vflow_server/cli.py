"""The command ``vflow``: serve, token, chat, strategies, retune, health."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from vflow_client import terminal
from vflow_client.commands import retune, strategies
from vflow_server import collector, health_command, token_command
from vflow_server.exit_code import FAILED, NOT_NOW, STOPPED, USAGE
from vflow_server.option import OptionError, switch
from vflow_server.settings import CONFIG_VARIABLE, ENVIRONMENT_PREFIX, Group, Settings, load, options

_LAST_WORDS = 2.0
"""Seconds in which the last lines of the log must be written; nobody may be reading it."""

_CLIENTS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "chat": terminal.run,
    "strategies": strategies.run,
    "retune": retune.run,
}
"""The commands that talk with a running service."""

_COMMANDS: Mapping[str, Mapping[str, str]] = {
    "operate the service": {
        "serve": "run the service",
        "token": "make a token for a caller",
        "health": "ask a running service whether it serves: exit code 0, otherwise 1",
    },
    "talk with a running service": {
        "chat": "hold a conversation in the terminal",
    },
    "improve how pictures are pruned": {
        "strategies": "list, show, compare and activate strategies",
        "retune": "search for a better strategy",
    },
}
"""What ``vflow --help`` says about each command, by heading."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    _open_standard_streams()
    parsed = command_parser().parse_args(arguments)
    if parsed.command in _CLIENTS:
        return _CLIENTS[parsed.command](parsed)
    if parsed.command == "health":
        return health_command.run(parsed)
    try:
        if parsed.command == "token":
            return token_command.run(parsed)
        flags = {name: getattr(parsed, name) for name in options() if getattr(parsed, name) is not None}
        settings = load(flags, os.environ, parsed.config)
    except OptionError as error:
        return _refuse(error)
    return _serve(settings)


def _open_standard_streams() -> None:
    """Open what is closed of the three standard streams, so that no file or socket takes its number and is written to,
    or read from, by mistake."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def command_parser() -> argparse.ArgumentParser:
    """The arguments of ``vflow`` and of all its commands."""
    parser = _Parser(
        prog="vflow",
        usage="vflow [-h] [--version] COMMAND ...",
        description="Conversations about pictures on a small KV cache: every picture is pruned once.\n\n" + _overview(),
        epilog="`vflow COMMAND --help` explains the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vflow {version('vflowopt')}")
    # argparse lists commands without headings: they are hidden from its list, and _overview() shows them in groups.
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="vflow", help=argparse.SUPPRESS
    )
    serve = commands.add_parser(
        "serve",
        usage="vflow serve [option ...]",
        description="Run the service in the foreground until SIGTERM or Ctrl-C.",
        epilog="Every option can also be set by an environment variable "
        f"({ENVIRONMENT_PREFIX}KV_BUDGET for --kv-budget) or in a TOML file (kv_budget = ...); "
        "a flag wins over a variable, a variable over the file. "
        "(*) A tenant without any may exceed this limit by one, and one with less than an equal share may exceed those "
        "of sessions and of waiting requests, so that no tenant can shut out the others.",
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file with settings [{CONFIG_VARIABLE}]")
    groups = {group: serve.add_argument_group(group) for group in Group}
    for name, declared in options().items():
        help_text = declared.described().replace("%", "%%")  # argparse reads % as the start of a placeholder
        bare: dict[str, Any] = {"nargs": "?", "const": "on"} if declared.parse is switch else {}
        groups[Group(declared.group)].add_argument(
            f"--{name.replace('_', '-')}", metavar=declared.metavar, help=help_text, **bare
        )
    token_command.add_arguments(
        commands.add_parser(
            "token",
            description="Make a token for a caller, and its line for the file of `vflow serve --tokens`. The "
            "file holds only a hash of the token. A token stops working when its line is removed or has expired.",
        )
    )
    terminal.add_arguments(
        commands.add_parser(
            "chat",
            description="Ask a running service about pictures. Each answer streams, followed by a line with its "
            f"receipt. {terminal.HELP}.",
        )
    )
    strategies.add_arguments(
        commands.add_parser(
            "strategies", description="List, show, compare and activate the strategies of a running service."
        )
    )
    retune.add_arguments(
        commands.add_parser(
            "retune",
            description="Have a running service search for the strategy that preserves its answers best within a "
            "budget. Ctrl-C cancels the search and stores the best strategy so far as a draft.",
        )
    )
    health_command.add_arguments(
        commands.add_parser(
            "health",
            description="Ask a running service whether it serves: exit code 0 if it does, otherwise 1. It is asked "
            "once, without trying again.",
        )
    )
    return parser


def _overview() -> str:
    """The commands in groups."""
    return "\n\n".join(
        "\n".join([f"{heading}:", *(f"  {command:<12}{summary}" for command, summary in commands.items())])
        for heading, commands in _COMMANDS.items()
    )


def _serve(settings: Settings) -> int:
    import structlog

    from vflow_server.preflight import StartError, check
    from vflow_server.telemetry import logging

    logging.configure(settings.log_format, settings.log_level)
    log = structlog.get_logger(__name__)
    try:
        _stop_at_signals()
        check(settings)
        log.info("starting", version=version("vflowopt"), model=settings.model or "embedded", device=settings.device)
        collector.pause()  # until the service is ready
        # The model's libraries take seconds to import; nothing above waits for them.
        from vflow_server.app import ServiceFailed, run

        try:
            run(settings)
        except ServiceFailed:  # the log says why
            return FAILED
    except _StoppedAtStart:
        log.info("stopped before it was ready")
    except StartError as error:
        logging.refuse(str(error), machine=settings.log_format == "json")
        return NOT_NOW if error.may_pass else USAGE
    except Exception:
        log.critical("the service failed", exc_info=True)
        return FAILED
    finally:
        logging.flush(_LAST_WORDS)
    return STOPPED


class _StoppedAtStart(BaseException):
    """A signal came before the service was ready. No library takes this for an error that it may handle."""


def _stop_at_signals() -> None:
    """Let signals end the start, during which there is nothing to wait for. A second one ends it in any case."""

    def stop(number: int, frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)
        raise _StoppedAtStart

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def _refuse(error: Exception) -> int:
    from vflow_server.telemetry.logging import refuse

    refuse(str(error), machine=_logs_json())
    return USAGE


def _logs_json() -> bool:
    """Whether this process was started to serve and to log JSON, before it is known what else it was told."""
    given = sys.argv[1:]
    flags = {*given, *map("=".join, pairwise(given))}
    format_of_variable = os.environ.get(f"{ENVIRONMENT_PREFIX}LOG_FORMAT", "").strip()
    return given[:1] == ["serve"] and ("--log-format=json" in flags or format_of_variable == "json")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors have the form of the log."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit."""
        if _logs_json():
            self.exit(_refuse(ValueError(message)))
        super().error(message)
