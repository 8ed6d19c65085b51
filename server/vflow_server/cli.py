"""The command ``vflow``: serve, token, chat, strategies, retune, health."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vflow_client import terminal
from vflow_client.commands import retune, strategies
from vflow_server import health_command, token_command
from vflow_server.option import OptionError, switch
from vflow_server.settings import CONFIG_VARIABLE, ENVIRONMENT_PREFIX, Group, Settings, load, options

USAGE = 2
"""Exit code for wrong arguments or settings."""

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


def command_parser() -> argparse.ArgumentParser:
    """The arguments of ``vflow`` and of all its commands."""
    parser = argparse.ArgumentParser(
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
        "(*) A tenant without any may exceed this limit by one, so that no tenant can shut out the others.",
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
    from vflow_server.telemetry.logging import configure

    try:
        check(settings)
    except StartError as error:
        return _refuse(error)
    configure(settings.log_format, settings.log_level)
    structlog.get_logger(__name__).info(
        "starting", version=version("vflowopt"), model=settings.model or "embedded", device=settings.device
    )
    # The model's libraries take seconds to import; nothing above waits for them.
    from vflow_server.app import EngineDied, run

    try:
        run(settings)
    except StartError as error:
        return _refuse(error)
    except EngineDied:  # the log says why; a supervisor sees the exit code and restarts the service
        return 1
    return 0


def _refuse(error: Exception) -> int:
    print(f"vflow: {error}", file=sys.stderr)
    return USAGE
