"""How many conversations with one picture stay resident in a KV budget, at every retention: measured by filling it.

A service with that budget is asked one question in session after session, each about a picture of its own, until one
more no longer fits beside the others: the service then reports the first session whose cache was offloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

import vflow_client
from benchmarks.chat import Chat, draw_chats
from benchmarks.service import running_service
from benchmarks.table import Row, publish

STRATEGIES = {"100%": "full", "50%": "diverse-50", "25%": "diverse-25", "10%": "diverse-10"}
_DRAWN_AT_A_TIME = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="capacity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kv-budget", default="64MiB", help="KV budget of the service")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument(
        "--retention", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="which to fill it at"
    )
    parser.add_argument("--seed", type=int, default=2_000_000, help="of the pictures")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    rows = []
    for retention in tqdm(options.retention, unit="retention", disable=None):
        try:
            with running_service("--log-level", "warning", "--kv-budget", options.kv_budget) as address:
                figures = fill(address, STRATEGIES[retention], new_tokens=options.new_tokens, seed=options.seed)
        except (RuntimeError, vflow_client.VFlowError) as error:
            print(f"capacity: {error}", file=sys.stderr)
            return 1
        rows.append({"retention": retention, "kv_budget": options.kv_budget, **figures})
    publish(rows, options.json)
    whole, least = rows[0]["resident_conversations"], rows[-1]["resident_conversations"]
    if isinstance(whole, int) and isinstance(least, int) and {row["retention"] for row in rows} >= {"100%", "10%"}:
        print(f"resident conversations, 10% / 100%: {least / whole:.2f} (target >= 7)")
    return 0


def fill(address: str, strategy: str, *, new_tokens: int, seed: int) -> Row:
    """Open sessions until one no longer fits; the row's figures.

    Raises:
        VFlowError: the service refused one, as when the budget does not hold a single conversation.
    """
    names: list[str] = []
    kv_bytes = []
    with vflow_client.connect(address, timeout=None) as client:
        for chat in tqdm(_chats(seed), unit="session", leave=False, disable=None):
            session = client.session(strategy)
            answer = session.ask(chat.picture, chat.questions[0], max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            answer.read()
            names.append(session.name)
            kv_bytes.append(answer.receipt.kv_bytes)
            resident = sum(state.resident for state in client.sessions())
            if resident < len(names):
                break
        visual_kv_bytes = answer.images[0].kv_bytes
    return {
        "strategy": strategy,
        "resident_conversations": resident,
        "kv_bytes_per_conversation": round(sum(kv_bytes) / len(kv_bytes)),
        "visual_kv_bytes_per_conversation": visual_kv_bytes,
    }


def _chats(seed: int) -> Iterator[Chat]:
    """An endless stream of chats of one turn, drawn as they are needed."""
    while True:
        yield from draw_chats(_DRAWN_AT_A_TIME, turns=1, seed=seed)
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
