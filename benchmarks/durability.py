"""The cost of a data folder: each turn waits for its commit, and the first turn after a restart waits for its cache.

The same conversations run on a service without a data folder, and on one with it. Then the second service is restarted
twice, and each conversation continues by one turn: first from the KV caches in the folder, then without them, as after
a crash.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import vflow_client
from benchmarks.chat import Chat, draw_chats
from benchmarks.conversation import percentile
from benchmarks.service import running_service
from benchmarks.table import Row, publish

STRATEGY = "diverse-10"
QUIET = ("--log-level", "warning")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="durability", description=__doc__.split("\n\n")[0])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 16], help="conversations at once")
    parser.add_argument("--rounds", type=int, default=4, help="conversations one after the other")
    parser.add_argument("--turns", type=int, default=5, help="of each conversation")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--data", type=Path, help="where to make the data folder (default: where temporary files go)")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for at_once in options.at_once:
        chats = draw_chats(at_once * options.rounds, turns=options.turns + 2, seed=3_000_000)
        with tempfile.TemporaryDirectory(prefix="vflow-durability-", dir=options.data) as folder:
            rows += measure(chats, at_once, options.new_tokens, Path(folder))
    publish(rows, options.json)
    return 0


def measure(chats: Sequence[Chat], at_once: int, new_tokens: int, folder: Path) -> Iterator[Row]:
    """Run ``chats`` on both services; the rows."""
    flags = {"memory": QUIET, "folder": (*QUIET, "--data", str(folder))}
    for name, wanted in flags.items():
        with running_service(*wanted) as address:
            names, seconds, took = _hold(address, chats, at_once, new_tokens)
        yield _row(at_once, name, seconds, took)
    for kept_in, question in (("folder, after a stop", -2), ("folder, after a crash", -1)):
        if kept_in == "folder, after a crash":
            shutil.rmtree(folder / "kv")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        with running_service(*flags["folder"]) as address:
            begun = time.perf_counter()
            with ThreadPoolExecutor(at_once) as threads, vflow_client.connect(address, timeout=None) as client:
                asked = [
                    (client.attach(name), chat.questions[question]) for name, chat in zip(names, chats, strict=True)
                ]
                seconds = list(threads.map(lambda ask: _say(*ask, new_tokens), asked))
            row = _row(at_once, kept_in, seconds, time.perf_counter() - begun)
        yield {**row, "bytes_per_conversation": size // len(chats)}


def _hold(address: str, chats: Sequence[Chat], at_once: int, new_tokens: int) -> tuple[list[str], list[float], float]:
    """Run ``chats`` on a service; the names of the sessions, the seconds of each turn, and the seconds in all."""
    with vflow_client.connect(address, timeout=None) as client, ThreadPoolExecutor(at_once) as threads:

        def converse(chat: Chat) -> tuple[str, list[float]]:
            session = client.session(STRATEGY)
            session.add_image(chat.picture)
            return session.name, [_say(session, question, new_tokens) for question in chat.questions[:-2]]

        begun = time.perf_counter()
        held = list(tqdm(threads.map(converse, chats), total=len(chats), unit="chat", leave=False, disable=None))
        took = time.perf_counter() - begun
    return [name for name, _ in held], [seconds for _, turns in held for seconds in turns], took


def _say(session: vflow_client.Session, question: str, new_tokens: int) -> float:
    """Seconds from the question to the end of the answer."""
    begun = time.perf_counter()
    session.ask(question, max_new_tokens=new_tokens, min_new_tokens=new_tokens).read()
    return time.perf_counter() - begun


def _row(at_once: int, kept_in: str, seconds: Sequence[float], took: float) -> Row:
    return {
        "kept_in": kept_in,
        "at_once": at_once,
        "turns": len(seconds),
        "turns_per_second": len(seconds) / took,
        "turn_ms_p50": percentile(seconds, 50) * 1000,
        "turn_ms_p95": percentile(seconds, 95) * 1000,
        "bytes_per_conversation": None,
    }


if __name__ == "__main__":
    sys.exit(main())
