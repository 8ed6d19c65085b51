"""How decoding scales with the number of conversations: tokens/s of long answers to short texts, without pictures.

At three places, each of which includes those before it: the library (steps of the model), the engine (its thread,
scheduler, sampling and text), and a service process that answers a client over gRPC. All of them take turns, and
medians are shown. Prompts are short, so nearly all of the time is decoding.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import vflow_client
from benchmarks.service import running_service
from benchmarks.table import Row, publish
from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.engine import Engine, Steps
from vflow_server.engine.scheduler import Scheduler
from vflow_server.engine.token_meter import TokenMeter
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.logged_images import LoggedImages
from vflow_server.kv.manager import KVCacheManager
from vflow_server.kv.offload import OffloadStore
from vflow_server.kv.prefix_cache import PrefixCache
from vflow_server.telemetry.metrics import Metrics
from vflowopt.compression.strategy import Strategy
from vflowopt.demo import model_path
from vflowopt.runtime.generate import decode
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import Sampler
from vflowopt.runtime.sequence import Sequence as Conversation

AT_ONCE = (1, 2, 4, 8, 16, 32)
QUESTION = "what is in the picture ?"
BUDGET = 0.1

Decode = Callable[[int], float]
"""Generates the answers of so many conversations at once; returns tokens/s."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="batching", description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each, in turn")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the model")
    parser.add_argument("--conversations", type=_counts, default=list(AT_ONCE), help="default: 1,2,4,8,16,32")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    runtime = Runtime.load(model_path(), kv_budget=1 << 28)
    with ExitStack() as running:
        places: dict[str, Decode] = {
            "library": partial(in_library, runtime, options.new_tokens),
            "engine": running.enter_context(in_engine(runtime, options.new_tokens)),
            "grpc": running.enter_context(over_grpc(options.new_tokens, options.threads)),
        }
        rates: dict[tuple[str, int], list[float]] = {}
        for generate in places.values():
            generate(2)  # the first answers allocate memory
        counts = options.conversations
        progress = running.enter_context(tqdm(total=options.repeats * len(counts) * len(places), disable=None))
        for _ in range(options.repeats):
            for count in counts:
                for place, generate in places.items():
                    rates.setdefault((place, count), []).append(generate(count))
                    progress.update()
    publish(_rows(rates, list(places), counts), options.json)
    return 0


def _rows(rates: dict[tuple[str, int], list[float]], places: Sequence[str], counts: Sequence[int]) -> list[Row]:
    """A row for each number of conversations, with ratios to the first."""
    medians = {key: statistics.median(values) for key, values in rates.items()}
    rows: list[Row] = []
    for count in counts:
        row: dict[str, object] = {"conversations": count}
        for place in places:
            row[f"{place}_tokens_per_second"] = medians[place, count]
            row[f"{place}_times_the_first"] = medians[place, count] / medians[place, counts[0]]
        rows.append(row)
    return rows


def in_library(runtime: Runtime, new_tokens: int, count: int) -> float:
    """Tokens/s of the model's steps, in which the most likely tokens are drawn."""
    conversations = [_begun(runtime, number) for number in range(count)]
    samplers, limits = [Sampler() for _ in conversations], [None] * count
    runtime.advance(conversations, want_logits=False)
    for conversation in conversations:
        conversation.log.append(0)
    begun = time.perf_counter()
    for _ in range(new_tokens):
        for conversation, token in zip(conversations, runtime.step(conversations, limits, samplers), strict=True):
            assert token is not None
            conversation.log.append(token)
    rate = count * new_tokens / (time.perf_counter() - begun)
    for conversation in conversations:
        conversation.release()
    return rate


def _begun(runtime: Runtime, number: int) -> Conversation:
    """A conversation whose next answer no other conversation shares."""
    conversation = runtime.start(Strategy.preset(BUDGET, runtime.layers))
    conversation.log.extend(runtime.chat.turn(0, [f"{number} {QUESTION}"]))
    return conversation


@contextmanager
def in_engine(runtime: Runtime, new_tokens: int) -> Iterator[Decode]:
    """An engine on ``runtime``, whose answers are read as text."""
    metrics = Metrics()
    kv = KVCacheManager(runtime, PrefixCache(1), OffloadStore(0, None), LoggedImages(0), metrics)
    encoder = EncoderThread(runtime)
    scheduler = Scheduler(runtime, kv, ImageCache(0, runtime.model.device), encoder, metrics, TokenMeter())
    engine = Engine(waiting=max(AT_ONCE), running=max(AT_ONCE), schedule=scheduler, on_death=lambda: None)

    def work(number: int, emit: Callable[[str], None]) -> Steps[None]:
        conversation = _begun(runtime, number)
        try:
            yield from decode(
                conversation,
                runtime.chat,
                Sampler(),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                emit=emit,
            )
        finally:
            conversation.release()

    async def answers(count: int) -> float:
        async def read(number: int) -> None:
            ticket = engine.submit(partial(work, number), "tenant")
            async for _ in ticket.events():
                pass
            await ticket.result()

        begun = time.perf_counter()
        await asyncio.gather(*map(read, range(count)))
        return count * new_tokens / (time.perf_counter() - begun)

    engine.start()
    try:
        yield lambda count: asyncio.run(answers(count))
    finally:
        engine.stop()
        encoder.close()
        kv.close()


@contextmanager
def over_grpc(new_tokens: int, threads: int) -> Iterator[Decode]:
    """A service process, and a client in this one."""
    with (
        running_service("--log-level", "warning", "--threads", str(threads)) as address,
        vflow_client.connect(address, timeout=None) as client,
        ThreadPoolExecutor(max(AT_ONCE)) as pool,
    ):

        def answer(number: int) -> int:
            session = client.session()
            reply = session.ask(f"{number} {QUESTION}", max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            for _ in reply:
                pass
            session.delete()
            return reply.usage.completion_tokens

        def generate(count: int) -> float:
            begun = time.perf_counter()
            return sum(pool.map(answer, range(count))) / (time.perf_counter() - begun)

        yield generate


def _counts(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    if not all(1 <= number <= max(AT_ONCE) for number in numbers):
        raise argparse.ArgumentTypeError(f"give numbers from 1 to {max(AT_ONCE)}")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
