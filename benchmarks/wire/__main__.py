"""What the way from a token to the wire costs: processor time of the service's threads for each token and each call.

A real service answers over a real channel, and logs as it does by default. The first columns are its event loop, its
engine's thread, the thread of gRPC that waits for what happens on the wire, and all other threads. Messages are those
that the text of a stream came in. Calls are the functions, of Python and of C, that the event loop and the engine's
thread called, counted in a run of its own. With --against two services take turns, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import grpc
import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.table import Row, publish
from benchmarks.wire import probed_service
from vflow_client.v1 import conversations_pb2_grpc, images_pb2
from vflow_client.v1.conversations_pb2 import (
    AddImageRequest,
    ChatOptions,
    ChatRequest,
    CreateSessionRequest,
    DeleteSessionRequest,
    GetSessionRequest,
    Part,
)

READY = "VFlow is ready on "
AT_ONCE = (1, 4, 16, 64)
NEW_TOKENS = 128
SMALL = 4
"""Tokens of the answer of a small turn."""

Stub = Any


@dataclass(frozen=True)
class Use:
    """What a service's threads have used: nanoseconds of processor time and calls, by name of the thread."""

    threads: Mapping[str, Mapping[str, int]]

    def since(self, earlier: Use, kind: str, name: str) -> int:
        """What the threads whose name contains ``name`` have used of ``kind`` since then."""
        return sum(
            used[kind] - earlier.threads.get(thread, {kind: 0})[kind]
            for thread, used in self.threads.items()
            if name in thread
        )


@dataclass(frozen=True)
class Service:
    """A service with a probe."""

    process: subprocess.Popen[str]
    address: str

    def use(self) -> Use:
        """What its threads have used so far."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Use(json.loads(self.process.stdout.readline()))


@contextmanager
def serving(interpreter: str, *, calls: bool) -> Iterator[Service]:
    """Run a service with a probe within the block, with the VFlow that ``interpreter`` has installed.

    Raises:
        RuntimeError: it did not start; the message is its log.
    """
    flags = ["--port", "0", "--max-running", "64", "--max-waiting", "64"]
    command = [interpreter, probed_service.__file__, *([probed_service.CALLS] if calls else []), *flags]
    with (
        TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(READY):
                log.seek(0)
                raise RuntimeError(f"the service did not start: {log.read()}")
            yield Service(process, line.removeprefix(READY).strip())
        finally:
            process.kill()


@dataclass(frozen=True)
class Measured:
    """One run of some work.

    Attributes:
        units: tokens, or calls.
        messages: messages in which text came; 0 if none was streamed.
        seconds: each call took, as its caller saw it.
        wall: seconds of the whole.
        before: what the service had used before.
        after: what it had used afterwards.
    """

    units: int
    messages: int
    seconds: Sequence[float]
    wall: float
    before: Use
    after: Use

    def each(self, kind: str, name: str) -> float:
        """What a token or a call used of ``kind`` in the threads with that name."""
        return self.after.since(self.before, kind, name) / self.units


@dataclass(frozen=True)
class Work:
    """Work to be measured.

    Attributes:
        sessions: number of new sessions that it needs, which are made before.
        do: does it with the names of the sessions; returns the units, the messages and the seconds of each call.
    """

    sessions: int
    do: Callable[[Stub, Sequence[str]], Awaitable[tuple[int, int, list[float]]]]


def streams(at_once: int, tokens: int) -> Work:
    """Answers of so many tokens, so many at once."""

    async def do(stub: Stub, names: Sequence[str]) -> tuple[int, int, list[float]]:
        answers = await asyncio.gather(*(_turn(stub, name, tokens) for name in names))
        return at_once * tokens, sum(messages for messages, _ in answers), [seconds for _, seconds in answers]

    return Work(at_once, do)


def small_turns(number: int) -> Work:
    """Turns with a short answer, one after the other, each in a session of its own."""

    async def do(stub: Stub, names: Sequence[str]) -> tuple[int, int, list[float]]:
        answers = [await _turn(stub, name, SMALL) for name in names]
        return number, sum(messages for messages, _ in answers), [seconds for _, seconds in answers]

    return Work(number, do)


def session_reads(number: int) -> Work:
    """Calls of GetSession, one after the other."""

    async def do(stub: Stub, names: Sequence[str]) -> tuple[int, int, list[float]]:
        seconds = []
        for _ in range(number):
            begun = time.perf_counter()
            await stub.GetSession(GetSessionRequest(name=names[0]))
            seconds.append(time.perf_counter() - begun)
        return number, 0, seconds

    return Work(1, do)


def pictures(number: int) -> Work:
    """Pictures of 448 x 448 pixels that are added, one after the other, none of them known."""

    async def do(stub: Stub, names: Sequence[str]) -> tuple[int, int, list[float]]:
        random = np.random.default_rng()
        seconds = []
        for name in names:
            buffer = io.BytesIO()
            coarse = random.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((448, 448), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            begun = time.perf_counter()
            await stub.AddImage(AddImageRequest(session=name, image=images_pb2.Image(data=buffer.getvalue())))
            seconds.append(time.perf_counter() - begun)
        return number, 0, seconds

    return Work(number, do)


async def _turn(stub: Stub, session: str, tokens: int) -> tuple[int, float]:
    options = ChatOptions(max_new_tokens=tokens, min_new_tokens=tokens)
    begun, messages = time.perf_counter(), 0
    async for event in stub.Chat(ChatRequest(session=session, parts=[Part(text="What is it?")], options=options)):
        messages += event.HasField("delta")
    return messages, time.perf_counter() - begun


async def measure(service: Service, work: Work) -> Measured:
    """Do ``work`` once, on one channel."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = conversations_pb2_grpc.ConversationsStub(channel)
        names = [(await stub.CreateSession(CreateSessionRequest())).name for _ in range(work.sessions)]
        before, begun = service.use(), time.perf_counter()
        units, messages, seconds = await work.do(stub, names)
        measured = Measured(units, messages, seconds, time.perf_counter() - begun, before, service.use())
        for name in names:
            await stub.DeleteSession(DeleteSessionRequest(name=name))
        return measured


def row(work: str, service: str, measured: Sequence[Measured], counted: Measured) -> Row:
    """The figures of some work as a row: medians over its runs."""

    def microseconds(*names: str) -> float:
        return statistics.median(sum(run.each("ns", name) for name in names) / 1e3 for run in measured)

    threads = ("MainThread", "vflow-engine", "_poll_wrapper")
    return {
        "work": work,
        "service": service,
        "loop_us": microseconds("MainThread"),
        "engine_us": microseconds("vflow-engine"),
        "grpc_us": microseconds("_poll_wrapper"),
        "others_us": statistics.median(
            (run.each("ns", "process") - sum(run.each("ns", name) for name in threads)) / 1e3 for run in measured
        ),
        "messages": statistics.median(run.messages / run.units for run in measured),
        "loop_calls": counted.each("calls", "MainThread"),
        "engine_calls": counted.each("calls", "vflow-engine"),
        "per_second": statistics.median(run.units / run.wall for run in measured),
        "call_ms": statistics.median(seconds for run in measured for seconds in run.seconds) * 1e3,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="wire", description=__doc__.split("\n\n")[0])
    parser.add_argument("--at-once", type=int, nargs="*", default=AT_ONCE, metavar="N", help="streams at once")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="tokens of the answer of a stream")
    parser.add_argument("--calls", type=int, default=200, help="small turns and reads of a session; a tenth pictures")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the medians are taken")
    parser.add_argument("--against", metavar="PYTHON", help="interpreter with another VFlow, to measure, too")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    works: dict[str, Work] = {f"token, {n} at once": streams(n, options.new_tokens) for n in options.at_once}
    works |= {"small turn": small_turns(options.calls), "GetSession": session_reads(options.calls)}
    works["AddImage"] = pictures(max(options.calls // 10, 1))
    interpreters = {"this": sys.executable}
    if options.against:
        interpreters = {"other": options.against, **interpreters}
    with ExitStack() as running:
        counted = {}
        for name, interpreter in interpreters.items():
            with serving(interpreter, calls=True) as service:
                counted[name] = {work: asyncio.run(measure(service, works[work])) for work in works}
        services = {
            name: running.enter_context(serving(interpreter, calls=False)) for name, interpreter in interpreters.items()
        }
        rows = []
        for work in tqdm(works, unit="row", disable=None):
            runs: dict[str, list[Measured]] = {name: [] for name in services}
            for repeat in range(options.repeats + 1):
                for name, service in services.items():
                    measured = asyncio.run(measure(service, works[work]))
                    if repeat or not options.repeats:  # the first one warms up
                        runs[name].append(measured)
            rows += [row(work, name, runs[name], counted[name][work]) for name in services]
    publish(rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
