"""Conversations about pictures, several at once: VFlow beside its alternatives, on the same weights.

Each conversation is a 448 x 448 picture of its own and five turns of 24 new tokens, greedy, the end of text ignored.
Every conversation sends its next turn when the last one is answered. The systems take turns on the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import vflow_client
from benchmarks.chat import Chat, draw_chats
from benchmarks.closed_loop import Held, hold
from benchmarks.openai_system import OpenAISystem, kv_bytes_per_token
from benchmarks.system import System
from benchmarks.table import Row, publish
from benchmarks.transformers_system import TransformersSystem
from benchmarks.vflow_system import VFlowSystem
from vflowopt.demo import model_path
from vflowopt.models.loading import DTYPES

AT_ONCE = (1, 4, 16, 32)
TURNS = 5
NEW_TOKENS = 24
PRUNED, WHOLE = "vflow@10%", "vflow@100%"
STATELESS, CACHED, VLLM = "transformers-stateless", "transformers-cached", "vllm"
STRATEGIES = {PRUNED: "diverse-10", WHOLE: "full"}

NOTES = """\
All systems: the embedded model, greedy, {turns} turns of {tokens} new tokens; times as the client sees them.
vflow and transformers: float32, {threads} threads; vflow's vision tower in bfloat16 where the service chooses that
(--serve=--tower-dtype=float32: in float32, too). vflow: one service process per budget, over gRPC. transformers:
`generate`, one turn at a time (it batches nothing over conversations; waiting counts); stateless runs everything again
in every turn, and its KV cache lives for the turn only. vllm: over HTTP, everything sent in every turn; its KV bytes
are computed from the tokens. Resident memory holds what a server sets aside for KV caches as far as it touched it."""


@dataclass
class Figures:
    """The measurements of one system with one number of conversations at once, over all repeats."""

    held: list[Held] = field(default_factory=list)
    picture_ahead_ms: list[float] = field(default_factory=list)

    def row(self, system: str, at_once: int) -> Row:
        """The figures as a row of the table: medians over the repeats, percentiles over all turns."""
        conversations = [replies for held in self.held for replies in held.conversations]
        first = [replies[0].first_token_s * 1e3 for replies in conversations]
        later = [reply.first_token_s * 1e3 for replies in conversations for reply in replies[1:]]
        visual = [replies[-1].visual_kv_bytes for replies in conversations]
        resident = [held.resident_bytes for held in self.held if held.resident_bytes is not None]
        return {
            "system": system,
            "conversations": at_once,
            "turns_per_second": statistics.median(held.turns / held.seconds for held in self.held),
            "tokens_per_second": statistics.median(held.tokens / held.seconds for held in self.held),
            "first_token_ms_p50_first_turn": percentile(first, 50),
            "first_token_ms_p95_first_turn": percentile(first, 95),
            "first_token_ms_p50_later_turns": percentile(later, 50),
            "first_token_ms_p95_later_turns": percentile(later, 95),
            "first_token_ms_p50_picture_ahead": percentile(self.picture_ahead_ms, 50),
            "kv_bytes_per_conversation": round(statistics.mean(replies[-1].kv_bytes for replies in conversations)),
            "visual_kv_bytes_per_conversation": round(statistics.mean(each for each in visual if each is not None))
            if None not in visual
            else None,
            "resident_bytes": max(resident, default=None),
        }


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The smallest value that at least ``percent`` of 100 do not exceed; None of no values."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = _options(arguments)
    try:
        rows = measure(options)
    except (RuntimeError, vflow_client.VFlowError) as error:
        print(f"conversation: {error}", file=sys.stderr)
        return 1
    publish(rows, options.json)
    print(NOTES.format(turns=options.turns, tokens=options.new_tokens, threads=options.threads))
    for line in compared(rows):
        print(line)
    return 0


def measure(options: argparse.Namespace) -> list[Row]:
    """Run every system at every number of conversations, ``repeats`` times over.

    Raises:
        RuntimeError: a system did not start, or failed.
    """
    figures = {(name, at_once): Figures() for at_once in options.conversations for name in options.systems}
    per_repeat = {at_once: max(at_once, options.talks) for at_once in options.conversations}
    with ExitStack() as running:
        systems: dict[str, System] = {}
        for name in options.systems:
            systems[name] = _start(name, options)
            running.callback(systems[name].close)
        for number, system in enumerate(systems.values()):
            # The first pass of a process allocates memory, and compiles what is compiled.
            hold(system, draw_chats(2, turns=2, seed=options.seed - 1 - number), 2, lambda: None)
        progress = running.enter_context(
            tqdm(
                total=options.repeats * sum(per_repeat.values()) * options.turns * len(systems),
                unit="turn",
                disable=None,
            )
        )
        for repeat in range(options.repeats):
            for at_once, count in per_repeat.items():
                chats = draw_chats(count, turns=options.turns, seed=options.seed + 1000 * repeat + at_once)
                for name, system in systems.items():
                    progress.set_description(f"{name}, {at_once} at once")
                    figures[name, at_once].held.append(hold(system, chats, at_once, progress.update))
        alone = min(options.conversations)
        chats = draw_chats(options.talks, turns=1, seed=options.seed - 1000)
        for name, system in systems.items():
            if isinstance(system, VFlowSystem):
                figures[name, alone].picture_ahead_ms = list(_picture_ahead(system, chats))
    return [each.row(name, at_once) for (name, at_once), each in figures.items()]


def compared(rows: Iterable[Row]) -> list[str]:
    """The ratios that the project aims for, as far as the rows have both sides."""
    table: Mapping[tuple[object, object], Row] = {(row["system"], row["conversations"]): row for row in rows}
    turns, tokens = "turns_per_second", "tokens_per_second"
    later, ahead = "first_token_ms_p50_later_turns", "first_token_ms_p50_picture_ahead"
    visual = "visual_kv_bytes_per_conversation"
    # What is called, numerator and denominator as (system, conversations, figure), and what to reach.
    ratios = [
        ("turns/s at 16, 10% / vllm", (PRUNED, 16, turns), (VLLM, 16, turns), ">= 2"),
        ("turns/s at 16, 100% / vllm", (WHOLE, 16, turns), (VLLM, 16, turns), ">= 1"),
        ("turns/s at 16, 10% / transformers stateless", (PRUNED, 16, turns), (STATELESS, 16, turns), ">= 10"),
        ("turns/s at 16, 10% / transformers cached", (PRUNED, 16, turns), (CACHED, 16, turns), ">= 4"),
        ("first token of later turns at 1, 10% / vllm", (PRUNED, 1, later), (VLLM, 1, later), "<= 0.5"),
        ("first token, picture added ahead / later turns, 10%", (PRUNED, 1, ahead), (PRUNED, 1, later), "<= 1.2"),
        ("tokens/s at 16 / at 1, 10%", (PRUNED, 16, tokens), (PRUNED, 1, tokens), ">= 6"),
        ("KV bytes of the picture, 10% / 100%", (PRUNED, 1, visual), (WHOLE, 1, visual), "<= 0.11"),
    ]
    lines = []
    for name, (system, at_once, figure), (other, other_at_once, other_figure), target in ratios:
        above = table.get((system, at_once), {}).get(figure)
        below = table.get((other, other_at_once), {}).get(other_figure)
        if isinstance(above, int | float) and isinstance(below, int | float):
            lines.append(f"{name:<52} {above / below:8.3f}   (target {target})")
    return lines


def _picture_ahead(system: VFlowSystem, chats: Iterable[Chat]) -> Iterable[float]:
    """Milliseconds to the first token of a first question whose picture was added before, one chat after another."""
    for chat in chats:
        opened = system.open(chat, picture_ahead=True)
        yield opened.say(chat.questions[0]).first_token_s * 1e3
        opened.close()


def _start(name: str, options: argparse.Namespace) -> System:
    """Start a system by its name."""
    if name in STRATEGIES:
        return VFlowSystem(
            name, STRATEGIES[name], new_tokens=options.new_tokens, threads=options.threads, flags=tuple(options.serve)
        )
    if name == VLLM:
        return OpenAISystem(
            name,
            options.vllm,
            new_tokens=options.new_tokens,
            kv_bytes_per_token=kv_bytes_per_token(model_path(), DTYPES[options.vllm_dtype].itemsize),
        )
    return TransformersSystem(
        name, model_path(), keep_cache=name == CACHED, new_tokens=options.new_tokens, threads=options.threads
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    def words(known: Sequence[str]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose of {','.join(known)}")
            return text.split(",")

        return read

    def counts(text: str) -> list[int]:
        numbers = [int(word) for word in text.split(",")]
        if min(numbers) < 1:
            raise ValueError
        return numbers

    parser = argparse.ArgumentParser(prog="conversation", description=__doc__.split("\n\n")[0])
    every = (PRUNED, WHOLE, STATELESS, CACHED, VLLM)
    parser.add_argument(
        "--systems",
        type=words(every),
        help=f"of {','.join(every).replace('%', '%%')} (default: all, vllm where --vllm is given)",
    )
    parser.add_argument("--conversations", type=counts, default=list(AT_ONCE), help="at once (default: 1,4,16,32)")
    parser.add_argument(
        "--vllm", metavar="URL", help="http://host:port of an OpenAI-compatible server of the same model"
    )
    parser.add_argument("--vllm-dtype", choices=DTYPES, default="float32", help="number type of that server's KV cache")
    parser.add_argument("--repeats", type=int, default=3, help="how often everything is run; figures are medians")
    parser.add_argument("--talks", type=int, default=4, help="conversations of a run at least, one after another")
    parser.add_argument("--turns", type=int, default=TURNS, help="turns of a conversation")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each model")
    parser.add_argument("--serve", action="append", default=[], metavar="FLAG", help="further flag of vflow serve")
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the pictures and questions")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    options.systems = options.systems or [name for name in every if name != VLLM or options.vllm]
    if VLLM in options.systems and not options.vllm:
        parser.error("the system vllm needs --vllm http://host:port, where a server of the same model runs")
    return options


if __name__ == "__main__":
    sys.exit(main())
