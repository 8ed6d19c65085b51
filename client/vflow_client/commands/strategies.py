"""`vflow strategies`: lists, shows, compares and activates the strategies of a running service."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from vflow_client.client import Client
from vflow_client.commands.calibration_arguments import (
    add_calibration_arguments,
    calibration_of,
    naming_rejected_picture,
)
from vflow_client.commands.connection import add_connection_arguments, connected
from vflow_client.commands.exit_code import DONE, exit_code_of
from vflow_client.commands.message_json import as_json, print_json
from vflow_client.commands.output import fits_output, print_output
from vflow_client.commands.strategy_text import announce_active, describe_comparison, describe_strategy, list_strategies
from vflow_client.retry import DEFAULT_TIMEOUT
from vflow_client.v1.strategies_pb2 import Strategy

if TYPE_CHECKING:
    from rich.console import RenderableType

COMPARISON_TIMEOUT = 600.0
"""Seconds for a comparison, which runs only while no conversation needs the model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions and their options on `parser`."""
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="all strategies, the active one marked")
    show = actions.add_parser("show", help="the parameters, provenance and history of a strategy")
    show.add_argument("name", nargs="?", metavar="NAME", help="default: the active one")
    activate = actions.add_parser("activate", help="make a strategy the default of new sessions")
    activate.add_argument("name", metavar="NAME")
    rollback = actions.add_parser("rollback", help="activate the strategy that was active before")
    for changing in (activate, rollback):
        changing.add_argument(
            "--etag", default="", help="refuse if the active strategy has changed since `show` printed this etag"
        )
    for action in (listing, show, activate, rollback):
        add_connection_arguments(action, timeout=DEFAULT_TIMEOUT, limits="per call")
    compare = actions.add_parser("compare", help="compare two strategies on the same samples")
    compare.add_argument("first", metavar="FIRST")
    compare.add_argument("second", metavar="SECOND")
    add_calibration_arguments(compare, required=True)
    add_connection_arguments(compare, timeout=COMPARISON_TIMEOUT, limits="for the comparison")
    for action in (listing, show, activate, rollback, compare):
        action.add_argument(
            "--json", action="store_true", help="print the messages of the contract as JSON, for programs"
        )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with the parsed `arguments`; returns the exit code."""
    return exit_code_of(lambda: _act(arguments), arguments.address)


def _act(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        _ACTIONS[arguments.action](client, arguments)
    return DONE


def _list(client: Client, arguments: argparse.Namespace) -> None:
    strategies = list(client.strategies.list())
    if arguments.json:
        print_json([as_json(strategy) for strategy in strategies])
    else:
        full = list_strategies(strategies)
        print_output(full if fits_output(full) else list_strategies(strategies, parameters=False))


def _show(client: Client, arguments: argparse.Namespace) -> None:
    strategy = client.strategies.get(arguments.name) if arguments.name else _active(client)
    _print(strategy, describe_strategy, arguments)


def _activate(client: Client, arguments: argparse.Namespace) -> None:
    _print(client.strategies.activate(arguments.name, etag=arguments.etag), announce_active, arguments)


def _rollback(client: Client, arguments: argparse.Namespace) -> None:
    _print(client.strategies.rollback(etag=arguments.etag), announce_active, arguments)


def _compare(client: Client, arguments: argparse.Namespace) -> None:
    source = calibration_of(arguments)
    assert source is not None, "the parser requires one"
    with naming_rejected_picture(source):
        comparison = client.strategies.compare(arguments.first, arguments.second, source)
    _print(comparison, describe_comparison, arguments)


_ACTIONS: Mapping[str, Callable[[Client, argparse.Namespace], None]] = {
    "list": _list,
    "show": _show,
    "activate": _activate,
    "rollback": _rollback,
    "compare": _compare,
}


def _active(client: Client) -> Strategy:
    return next(strategy for strategy in client.strategies.list() if strategy.active)


MessageT = TypeVar("MessageT", bound=Message)


def _print(message: MessageT, describe: Callable[[MessageT], RenderableType], arguments: argparse.Namespace) -> None:
    """Prints a message as JSON for programs or, as `describe` puts it, for people."""
    if arguments.json:
        print_json(as_json(message))
    else:
        print_output(describe(message))
