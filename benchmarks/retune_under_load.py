"""What a search for a strategy costs conversations: the time between two tokens, with and without a search.

A few sessions stream long answers at once, round after round; during every other round the service searches. Rounds
alternate within one run, so that other load on the machine affects both kinds alike.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

import vflow_client
from benchmarks.chat import Chat, draw_chats
from benchmarks.service import running_service
from benchmarks.table import Row, publish
from vflow_client.commands.share import share

TARGET = 1.25
"""The greatest acceptable ratio of the 95th percentiles, with a search to without."""

_ENDLESS = 1000
"""Trials of a search: more than a round has time for."""


@dataclass
class Streamed:
    """The rounds of one kind: seconds between tokens, and trials that searches finished meanwhile."""

    gaps: list[float] = field(default_factory=list)
    trials: int = 0

    def row(self, name: str) -> Row:
        """The row's figures."""
        p50, p95, p99 = (round(float(value), 3) for value in np.percentile(self.gaps, [50, 95, 99]) * 1000)
        mean = round(float(np.mean(self.gaps)) * 1000, 3)
        return {
            "conversations": name,
            "tokens": len(self.gaps),
            "mean_ms": mean,
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
            "trials": self.trials,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="retune_under_load", description=__doc__.split("\n\n")[0])
    parser.add_argument("--streams", type=int, default=4, help="answers at once")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each kind")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--samples", type=int, default=30, help="calibration samples of the search")
    parser.add_argument("--budget", type=share, default=0.1, help="of the search")
    parser.add_argument("--seed", type=int, default=9_000_000, help="of the pictures")
    parser.add_argument("--flags", default="", help="further flags of `vflow serve`, in one text")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    chats = draw_chats(options.streams, turns=1, seed=options.seed)
    samples = [
        vflow_client.Sample(chat.picture, chat.questions)
        for chat in draw_chats(options.samples, turns=3, seed=options.seed + 1)
    ]
    alone, beside = Streamed(), Streamed()
    try:
        with (
            running_service("--log-level", "warning", *options.flags.split()) as address,
            vflow_client.connect(address, timeout=None) as client,
        ):
            stream(client, chats, new_tokens=options.new_tokens)  # warms up
            for _ in tqdm(range(options.rounds), unit="round", disable=None):
                alone.gaps += stream(client, chats, new_tokens=options.new_tokens)
                with searching(client, samples, options.budget) as search:
                    before = len(search.refresh().tried)
                    beside.gaps += stream(client, chats, new_tokens=options.new_tokens)
                    beside.trials += len(search.refresh().tried) - before
    except (RuntimeError, vflow_client.VFlowError) as error:
        print(f"retune_under_load: {error}", file=sys.stderr)
        return 1
    rows = [alone.row("alone"), beside.row("beside a search")]
    publish(rows, options.json)
    ratio = np.percentile(beside.gaps, 95) / np.percentile(alone.gaps, 95)
    print(f"p95 between two tokens, beside a search / alone: {ratio:.2f} (target <= {TARGET})")
    return 0


@contextmanager
def searching(
    client: vflow_client.Client, samples: Sequence[vflow_client.Sample], budget: float
) -> Iterator[vflow_client.Retune]:
    """A running search, past its first trial, so that it does all kinds of work; cancelled at the end."""
    search = client.strategies.retune(budget, samples, trials=_ENDLESS)
    try:
        while not search.refresh().tried and not search.done:
            time.sleep(0.1)
        yield search
    finally:
        search.cancel()
        search.wait()


def stream(client: vflow_client.Client, chats: Sequence[Chat], *, new_tokens: int) -> list[float]:
    """Stream an answer about each chat's picture, all at once; the seconds between the pieces of each."""

    def gaps(session: vflow_client.Session, question: str) -> list[float]:
        answer = session.ask(question, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        return [later - earlier for earlier, later in pairwise([time.perf_counter() for _ in answer])]

    sessions = [client.session() for _ in chats]
    try:
        for session, chat in zip(sessions, chats, strict=True):
            session.add_image(chat.picture)
        with ThreadPoolExecutor(len(chats)) as threads:
            seen = threads.map(gaps, sessions, [chat.questions[0] for chat in chats])
            return [gap for each in seen for gap in each]
    finally:
        for session in sessions:
            session.delete()


if __name__ == "__main__":
    sys.exit(main())
