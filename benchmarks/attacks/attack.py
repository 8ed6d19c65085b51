"""The attacks: what hostile callers do. Each goes on until it is cancelled.

``python -m benchmarks.attacks.attack NAME ADDRESS [TOKEN ...]`` runs one in a process of its own, at the lowest
priority, so that the service has the processor that it would have if the attackers were on other machines.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import grpc
import numpy as np
from PIL import Image

import vflow_client.aio
from benchmarks.attacks import hostile_file
from benchmarks.attacks.holding_relay import HoldingRelay
from vflow_client import RetryPolicy, VFlowError

HEALTH_CHECK, HEALTH_WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CHAT = "/vflow.v1.Conversations/Chat"

LARGE = 60 * 2**20
"""Bytes of a message just within the default bound."""

_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Crowd:
    """The attackers.

    Attributes:
        address: the service's host and port.
        tokens: their tokens; none if they have none.
    """

    address: str
    tokens: Sequence[str]

    def client(self, number: int) -> vflow_client.aio.Client:
        """A connection of the attacker with this number, who counts round the tokens."""
        return vflow_client.aio.connect(
            self.address, token=self.tokens[number % len(self.tokens)], timeout=60, retry=RetryPolicy(attempts=1)
        )

    def metadata(self, number: int) -> Metadata:
        """What the attacker with this number sends ahead of a call."""
        return (("authorization", f"Bearer {self.tokens[number % len(self.tokens)]}"),) if self.tokens else ()

    def channel(self, address: str | None = None) -> grpc.aio.Channel:
        """A connection of its own."""
        return grpc.aio.insecure_channel(address or self.address, options=_OPTIONS)


Source = Callable[[], bytes]


async def fork_races(crowd: Crowd) -> None:
    """Fork sessions whose turn is running; use the twins at once, and delete them."""

    async def race(number: int) -> None:
        async with crowd.client(number) as client:
            while True:
                with suppress(VFlowError):
                    async with await client.session() as origin:
                        answer = await origin.ask("Go on.", max_new_tokens=400, min_new_tokens=400)
                        async for _ in answer:
                            break
                        fork = asyncio.ensure_future(_quiet(origin.fork()))
                        await asyncio.sleep(0)
                        twins = [client.attach(each.name) async for each in client.sessions()]
                        for twin in twins:
                            if twin.name != origin.name:
                                with suppress(VFlowError):
                                    await (await twin.ask("And now?", max_new_tokens=4)).read()
                                with suppress(VFlowError):
                                    await twin.delete()
                        answer.close()
                        await fork
                await asyncio.sleep(0.01)

    await _all(race, 4)


async def long_texts(crowd: Crowd) -> None:
    """Send turns of six million characters that no context can hold."""
    kinds = (" x", "\N{GRINNING FACE}", "a", "<|im_end|>", " ", "\n\t", "<image>", "né")

    async def send(number: int) -> None:
        async with crowd.client(number) as client:
            for kind in itertools.cycle(kinds):
                with suppress(VFlowError):
                    async with await client.session() as session:
                        part = (kind * 100_000)[:99_999] + "."
                        await (await session.ask(*[part] * 64, max_new_tokens=1)).read()
                await asyncio.sleep(0.01)

    await _all(send, max(2, len(crowd.tokens)))


async def open_streams(crowd: Crowd, method: str, most: int = 6000) -> None:
    """Open streams on four connections and leave them open."""
    channels = [crowd.channel() for _ in range(4)]
    try:
        while True:
            calls: list[grpc.aio.StreamStreamCall[bytes, bytes]] = []
            for number in range(most):
                call = channels[number % 4].stream_stream(method, bytes, bytes)(metadata=crowd.metadata(number))
                calls.append(call)
                if method == HEALTH_WATCH:
                    with suppress(grpc.RpcError, asyncio.InvalidStateError):
                        await call.write(b"")
                        await call.done_writing()
                if number % 64 == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(10)
            for call in calls:
                call.cancel()
    finally:
        for channel in channels:
            await channel.close()


async def large_messages(crowd: Crowd, method: str, calls: int = 24) -> None:
    """Send messages of 60 MiB to a method, ``calls`` at once."""
    content = b"\x0a" + _varint(LARGE) + bytes(LARGE)

    async def send(number: int) -> None:
        async with crowd.channel() as channel:
            while True:
                with suppress(grpc.RpcError):
                    await channel.unary_unary(method, bytes, bytes)(
                        content, metadata=crowd.metadata(number), timeout=30
                    )
                await asyncio.sleep(0.01)

    await _all(send, calls)


async def held_back(crowd: Crowd, method: str, calls: int = 30) -> None:
    """Announce messages of 60 MiB, and hold back the last bytes for a minute."""
    content = b"\x0a" + _varint(LARGE) + bytes(LARGE)

    async def hold(number: int) -> None:
        while True:
            async with HoldingRelay(crowd.address, most=LARGE) as relay, crowd.channel(relay.address) as channel:
                with suppress(grpc.RpcError):
                    await channel.unary_unary(method, bytes, bytes)(
                        content, metadata=crowd.metadata(number), timeout=60
                    )
            await asyncio.sleep(0.01)

    await _all(hold, calls)


async def pictures(crowd: Crowd, make: Source, *, at_once: int, patience: float) -> None:
    """Send a picture file again and again, and go away after ``patience`` seconds."""
    content, numbers = await asyncio.to_thread(make), itertools.count()

    async def send(number: int) -> None:
        async with crowd.client(number) as client:
            while True:
                # Bytes behind the end of a picture make another picture of it.
                with suppress(VFlowError):
                    await client.compress(content + b"%d" % next(numbers), timeout=patience)
                await asyncio.sleep(0.01)

    await _all(send, at_once)


async def clips(crowd: Crowd, frames: int = 256) -> None:
    """Send clips of as many frames as are accepted."""
    chance = np.random.default_rng()

    async def send(number: int) -> None:
        async with crowd.client(number) as client:
            while True:
                clip = [_frame(chance) for _ in range(frames)]
                with suppress(VFlowError):
                    async with await client.session() as session:
                        await session.add_video(clip, fps=8)
                await asyncio.sleep(0.01)

    await _all(send, max(2, len(crowd.tokens)))


By = Literal["no token", "one tenant", "many tenants"]


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        name: what happens, in a word or two.
        by: who attacks.
        run: attacks until it is cancelled.
    """

    name: str
    by: By
    run: Callable[[Crowd], Awaitable[None]]


def _attacks() -> Iterator[Attack]:
    yield Attack("watch streams", "no token", partial(open_streams, method=HEALTH_WATCH))
    yield Attack("reflection streams", "no token", partial(open_streams, method=REFLECTION))
    yield Attack("large checks", "no token", partial(large_messages, method=HEALTH_CHECK))
    yield Attack("checks held back", "no token", partial(held_back, method=HEALTH_CHECK))
    for by in ("one tenant", "many tenants"):
        yield Attack("fork races", by, fork_races)
        yield Attack("long texts", by, long_texts)
        yield Attack("calls without a message", by, partial(open_streams, method=CHAT))
        yield Attack("turns held back", by, partial(held_back, method=CHAT))
        for name, make in (
            ("JPEG of scans", hostile_file.progressive_scans),
            ("PNG of chunks", hostile_file.png_of_empty_chunks),
            ("JPEG of segments", hostile_file.jpeg_of_empty_segments),
            ("BMP of runs", hostile_file.run_length_bmp),
        ):
            yield Attack(name, by, partial(pictures, make=make, at_once=8, patience=1.0))
        yield Attack("large pictures", by, partial(pictures, make=hostile_file.large_png, at_once=90, patience=30.0))
        yield Attack("clips", by, clips)


ATTACKS = tuple(_attacks())


@contextmanager
def attacking(
    attacks: Sequence[Attack], address: str, tokens: Sequence[str], *, seconds_each: float | None = None
) -> Iterator[None]:
    """Attack for the length of the block, from a process of its own.

    Args:
        attacks: the attacks.
        address: the service's host and port.
        tokens: the attackers' tokens, one of each tenant.
        seconds_each: how long an attack lasts before the next one begins, in an order drawn anew each round; None:
            all of them last to the end.
    """
    numbers = ",".join(str(ATTACKS.index(attack)) for attack in attacks)
    command = (sys.executable, "-m", __spec__.name, numbers, str(seconds_each or 0), address, *tokens)
    with subprocess.Popen(command) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def main(numbers: str, seconds_each: str, address: str, *tokens: str) -> None:
    """Run the attacks with these numbers until SIGTERM."""
    os.nice(19)
    attacks = [ATTACKS[int(number)] for number in numbers.split(",")]
    asyncio.run(_until_terminated(_alternate(attacks, float(seconds_each), address, tokens)))


async def _until_terminated(attack: Awaitable[None]) -> None:
    task = asyncio.ensure_future(attack)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


async def _alternate(attacks: Sequence[Attack], seconds_each: float, address: str, tokens: Sequence[str]) -> None:
    def start(attack: Attack) -> Awaitable[None]:
        attackers = {"no token": 0, "one tenant": 1, "many tenants": len(tokens)}[attack.by]
        return attack.run(Crowd(address, tokens[:attackers]))

    if not seconds_each:
        await asyncio.gather(*map(start, attacks))
    while True:
        for attack in random.sample(attacks, len(attacks)):
            with suppress(TimeoutError):
                await asyncio.wait_for(start(attack), seconds_each)


async def _all(attacker: Callable[[int], Awaitable[None]], count: int) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(_forever(attacker, number))


async def _forever(attacker: Callable[[int], Awaitable[None]], number: int) -> None:
    await attacker(number)


async def _quiet(call: Awaitable[object]) -> None:
    with suppress(VFlowError):
        await call


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*groups, value))


def _frame(chance: np.random.Generator) -> bytes:
    file = io.BytesIO()
    coarse = chance.integers(0, 256, (14, 14, 3), np.uint8)
    Image.fromarray(coarse).resize((336, 336)).save(file, "JPEG")
    return file.getvalue()


if __name__ == "__main__":
    main(*sys.argv[1:])
