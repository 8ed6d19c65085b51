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
from vflow_client.commands.connection import add_tls_arguments, tls_of
from vflow_client.commands.exit_code import exit_code_of
from vflow_client.tls import Tls
from vflow_server import token_command
from vflow_server.option import OptionError, switch
from vflow_server.settings import CONFIG_VARIABLE, ENVIRONMENT_PREFIX, Settings, load, options

USAGE = 2
"""Exit code of a command that was asked for something it cannot do."""

_CLIENTS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "chat": terminal.run,
    "strategies": strategies.run,
    "retune": retune.run,
}
"""What the commands do that talk with a running service."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parsed = _parser().parse_args(arguments)
    if parsed.command in _CLIENTS:
        return _CLIENTS[parsed.command](parsed)
    if parsed.command == "health":
        return _health(parsed)
    try:
        if parsed.command == "token":
            return token_command.run(parsed)
        flags = {name: getattr(parsed, name) for name in options() if getattr(parsed, name) is not None}
        settings = load(flags, os.environ, parsed.config)
    except OptionError as error:
        return _refuse(error)
    return _serve(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vflow", description="Conversations about pictures on a small KV cache: every picture is pruned once."
    )
    parser.add_argument("--version", action="version", version=f"vflow {version('vflowopt')}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="run the service",
        description="Run the service in the foreground until SIGTERM or Ctrl-C.",
        epilog="Every option can also be set by an environment variable "
        f"({ENVIRONMENT_PREFIX}KV_BUDGET for --kv-budget) or in a TOML file (kv_budget = ...); "
        "a flag wins over a variable, a variable over the file. "
        "(*) A tenant that has none may go beyond by one: nobody is kept out because another took all there were.",
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file with settings [{CONFIG_VARIABLE}]")
    for name, declared in options().items():
        told = declared.described().replace("%", "%%")  # argparse would take it for a placeholder
        bare: dict[str, Any] = {"nargs": "?", "const": "on"} if declared.parse is switch else {}
        serve.add_argument(f"--{name.replace('_', '-')}", metavar=declared.metavar, help=told, **bare)
    token_command.add_arguments(
        commands.add_parser(
            "token",
            help="make a token for a caller",
            description="Make a token for a caller, and the line that lists it in the file that --tokens names. The "
            "service keeps its hash alone; a line that is taken out of the file, or has expired, lets nobody in.",
        )
    )
    terminal.add_arguments(
        commands.add_parser(
            "chat",
            help="a conversation in the terminal with a running service",
            description="Ask a running service about pictures. Answers stream as they come, each with a line that says "
            f"what it cost. {terminal.HELP}.",
        )
    )
    strategies.add_arguments(commands.add_parser("strategies", help="look at strategies, compare and activate them"))
    retune.add_arguments(
        commands.add_parser(
            "retune",
            help="search for a better strategy",
            description="Have a running service search for the strategy that keeps its answers best within a budget. "
            "Ctrl-C has the service cancel the search and keep the best so far.",
        )
    )
    health = commands.add_parser("health", help="ask a running service whether it serves (exit code 0) or not (1)")
    health.add_argument("--address", metavar="HOST:PORT", help="where it listens (default: this machine)")
    add_tls_arguments(health)
    return parser


def _serve(settings: Settings) -> int:
    # The model's libraries take seconds to import: --help and a wrong option do not wait for them.
    from vflow_server.app import EngineDied, StartError, run
    from vflow_server.telemetry.logging import configure

    configure(settings.log_format, settings.log_level)
    try:
        run(settings)
    except StartError as error:
        return _refuse(error)
    except EngineDied:  # the log has said why; a supervisor sees the exit code and starts anew
        return 1
    return 0


def _health(arguments: argparse.Namespace) -> int:
    address = arguments.address or f"127.0.0.1:{os.environ.get(f'{ENVIRONMENT_PREFIX}PORT', Settings.port)}"
    return exit_code_of(lambda: _asked_for_health(address, tls_of(arguments)), address)


def _asked_for_health(address: str, tls: Tls | None) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    channel = grpc.secure_channel(address, tls.credentials(), tls.options()) if tls else grpc.insecure_channel(address)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.RpcError as error:
            print(f"{address}: {error.details()}", file=sys.stderr)
            return 1
    print(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def _refuse(error: Exception) -> int:
    print(f"vflow: {error}", file=sys.stderr)
    return USAGE
