"""`vflow retune`: starts a search for a better strategy in a running service, and follows it.

Progress and errors go to the error stream, the result to the standard output.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import TYPE_CHECKING

from vflow_client.calibration import Sample
from vflow_client.client import Client
from vflow_client.commands.calibration_arguments import (
    add_calibration_arguments,
    calibration_of,
    describe_calibration,
    naming_rejected_picture,
)
from vflow_client.commands.connection import add_connection_arguments, connected
from vflow_client.commands.exit_code import DONE, FAILED, USAGE, exit_code_of, print_error
from vflow_client.commands.gain import doubt
from vflow_client.commands.message_json import as_json, print_json
from vflow_client.commands.objective_chart import LEGEND, objective_chart
from vflow_client.commands.output import print_output
from vflow_client.commands.progress import progress_on
from vflow_client.commands.share import share
from vflow_client.commands.strategy_text import announce_active, describe_change, describe_comparison, short
from vflow_client.commands.whole_number import at_least
from vflow_client.errors import Unavailable, VFlowError
from vflow_client.retune import Retune
from vflow_client.v1.strategies_pb2 import CompareStrategiesResponse, LiveTraffic, RetuneMetadata, Strategy

if TYPE_CHECKING:
    from rich.console import RenderableType

CALL_TIMEOUT = 600.0
"""Seconds for one call: to send many pictures, or for the comparison at the end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the search on `parser`."""
    search = parser.add_argument_group("search")
    search.add_argument(
        "--budget",
        type=share,
        metavar="SHARE",
        help="share of the visual tokens to keep, such as 0.1 or 10%%; required for a new search",
    )
    search.add_argument("--trials", type=at_least(1), metavar="N", help="strategies to try (default: the service's)")
    search.add_argument(
        "--seed",
        type=at_least(0),
        metavar="N",
        help="the same search with the same seed gives the same result (default: 0)",
    )
    search.add_argument("--base", metavar="NAME", help="strategy to start from (default: the active one)")
    search.add_argument(
        "--id", metavar="ID", help="last part of the new strategy's name (default: the service's choice)"
    )
    add_calibration_arguments(parser, required=False)
    result = parser.add_argument_group("result")
    result.add_argument(
        "--activate", action="store_true", help="activate the strategy that is found, unless its gain may be chance"
    )
    result.add_argument(
        "--detach", action="store_true", help="print the name of the operation and do not wait for the search"
    )
    result.add_argument(
        "--follow",
        metavar="OPERATION",
        help="follow a search that is running or has ended; --data is then used only for the comparison at the end",
    )
    result.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    add_connection_arguments(parser, timeout=CALL_TIMEOUT, limits="per call")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with the parsed `arguments`; returns the exit code. Ctrl-C cancels the search in the service."""
    if problem := _contradiction(arguments):
        print_error(problem)
        return USAGE
    return exit_code_of(lambda: _retune(arguments), arguments.address)


def _retune(arguments: argparse.Namespace) -> int:
    source = calibration_of(arguments)
    with connected(arguments) as client:
        search = _search(client, source, arguments)
        if not arguments.detach:
            return _follow(client, search, source, arguments)
        if arguments.json:
            print_json({"operation": search.name})
        else:
            print(search.name)
        return DONE


def _contradiction(arguments: argparse.Namespace) -> str | None:
    """The problem with the combination of options, if any."""
    if arguments.detach and arguments.activate:
        return "--activate waits for the end of the search, --detach does not: give one of them"
    if arguments.follow is None:
        if arguments.budget is None:
            return "a search needs --budget, such as --budget 0.1 (or follow one with --follow OPERATION)"
        if arguments.data is None and arguments.live is None:
            return "a search needs --data DIR or --live to measure strategies on"
        return None
    for option in ("budget", "live", "trials", "seed", "base", "id"):
        if getattr(arguments, option) is not None:
            return f"--{option} is for a new search, --follow is for one that has started: give one of them"
    return "--detach and --follow contradict each other: give one of them" if arguments.detach else None


def _search(client: Client, source: list[Sample] | LiveTraffic | None, arguments: argparse.Namespace) -> Retune:
    """The search to follow: a new one, or the one that `--follow` names."""
    if arguments.follow is not None:
        return client.strategies.operation(arguments.follow)
    assert source is not None, "a search without data was refused"
    with naming_rejected_picture(source):
        search = client.strategies.retune(
            arguments.budget,
            source,
            trials=arguments.trials,
            seed=arguments.seed or 0,
            base=arguments.base,
            strategy_id=arguments.id or "",
        )
    _print_status(f"{search.name}: budget {arguments.budget:.1%}, measured on {describe_calibration(source)}")
    return search


def _follow(
    client: Client, search: Retune, source: list[Sample] | LiveTraffic | None, arguments: argparse.Namespace
) -> int:
    """Shows the progress until the end, then the result."""
    uninterrupted = _follow_to_end(search)
    if not search.done:
        return FAILED
    try:
        strategy = search.result()
    except VFlowError as error:
        return _print_failure(search, error, arguments)
    if not uninterrupted:
        print_error(f"the search had ended already: {strategy.name} was created, but not activated")
        return FAILED
    return _print_result(client, search, strategy, source, arguments)


def _follow_to_end(search: Retune) -> bool:
    """Shows the progress until the search has ended or the user has left; returns False if the user interrupted."""
    try:
        _show_progress(search)
        return True
    except Unavailable:
        _print_status(
            f"the service cannot be reached; the search may still be running: vflow retune --follow {search.name}"
        )
        raise
    except KeyboardInterrupt:
        _print_status("cancelling; the best strategy so far is stored as a draft (Ctrl-C again: leave at once)")
    try:
        search.cancel()
        search.wait()
    except KeyboardInterrupt:
        _print_status(f"left before the search ended; see its result with: vflow retune --follow {search.name}")
    return False


def _show_progress(search: Retune) -> None:
    progress = progress_on(sys.stderr)
    try:
        for metadata in search:
            progress.show(metadata)
    finally:
        progress.close()


def _print_failure(search: Retune, error: VFlowError, arguments: argparse.Namespace) -> int:
    """Prints why a search failed, and the draft that it left."""
    metadata = search.metadata
    if arguments.json:
        failure = {"reason": error.reason or error.code.name, "message": error.message}
        print_json({"operation": search.name, "metadata": as_json(metadata), "error": failure})
    print_error(str(error))
    if metadata.best.name:
        _print_status(
            f"the best of {len(metadata.tried)} trials, objective {metadata.best_objective:.4f}, is stored as the "
            f"draft {metadata.best.name}"
        )
    return FAILED


def _print_result(
    client: Client,
    search: Retune,
    strategy: Strategy,
    source: list[Sample] | LiveTraffic | None,
    arguments: argparse.Namespace,
) -> int:
    """Prints the strategy that was found and what it changes; with `--activate`, activates it if it is a gain."""
    metadata = search.metadata
    base = client.strategies.get(metadata.base)
    if not arguments.json:
        print_output(_describe_search(metadata, strategy))
    comparison = _compare(client, base.name, strategy, source)
    if not arguments.json:
        change = describe_comparison(comparison) if comparison else describe_change(base, strategy)
        print_output("", change, "")
    hesitation = doubt(base, strategy, comparison) if arguments.activate else None
    activated = arguments.activate and hesitation is None
    if activated:
        strategy = client.strategies.activate(strategy.name)
    if arguments.json:
        found = {"strategy": as_json(strategy), "comparison": as_json(comparison) if comparison else None}
        print_json({"operation": search.name, "metadata": as_json(metadata), **found})
    elif activated:
        print_output(announce_active(strategy))
    else:
        print_output(f"activate it with: vflow strategies activate {short(strategy.name)}")
    if hesitation is not None:
        print_error(f"not activated: {hesitation}")
        return FAILED
    return DONE


def _compare(
    client: Client, base: str, strategy: Strategy, source: list[Sample] | LiveTraffic | None
) -> CompareStrategiesResponse | None:
    """Compares the strategy with the one that the search started from; None without samples to measure them on."""
    if not isinstance(source, list):
        return None  # The search has consumed the live traffic.
    _print_status(f"comparing with {short(base)} on the same samples")
    try:
        return client.strategies.compare(base, strategy.name, source)
    except VFlowError as error:
        print_error(f"no comparison: {error}")
        return None


def _describe_search(metadata: RetuneMetadata, strategy: Strategy) -> RenderableType:
    from rich.console import Group

    found = strategy.provenance
    columns = shutil.get_terminal_size().columns
    return Group(
        f"{strategy.name} found: objective {found.objective:.4f} at a budget of {strategy.budget:.1%}, "
        f"{short(found.base)} has {found.base_objective:.4f}",
        "",
        LEGEND,
        objective_chart(metadata.tried, width=min(columns, 100)),
    )


def _print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
