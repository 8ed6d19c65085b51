"""The scheduler on turns that meet in one step."""

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest

from vflow.v1.conversations_pb2 import Finished
from vflow_server.dialogue import Dialogue
from vflow_server.engine import Engine
from vflow_server.scheduler import Scheduler
from vflow_server.tenant import DEFAULT_TENANT
from vflow_server.turn import Turn, TurnRequest
from vflow_server.workbench import Workbench
from vflowopt.conversation import Conversation
from vflowopt.runtime import Runtime
from vflowopt.strategy import Strategy


@pytest.fixture
def bench(model_folder: Path) -> Iterator[Workbench]:
    """Room for 256 tokens, and nowhere to park."""
    runtime = Runtime.load(model_folder, kv_budget=400 << 10)
    runtime.chat.stop_ids = frozenset()
    bench = Workbench(runtime, compressed_bytes=0, parked_bytes=0)
    yield bench
    bench.residency.check()


def outcomes(bench: Workbench, texts: Sequence[str], tokens: int) -> list[Finished | BaseException]:
    """What becomes of turns with these texts, each in a dialogue of its own, whose first step is the same."""

    async def scene() -> list[Finished | BaseException]:
        engine = Engine(waiting=8, running=8, schedule=Scheduler(bench))
        engine.start()
        all_are_here = threading.Event()

        def hold(emit: Callable[[object], None]) -> Generator[None, None, None]:
            all_are_here.wait(5)
            return
            yield

        engine.submit(hold)
        tickets = [
            engine.submit(
                Turn(
                    bench,
                    Dialogue(Strategy.full(), DEFAULT_TENANT),
                    f"sessions/s{number}",
                    "strategies/full",
                    TurnRequest((text,), tokens),
                    time.perf_counter(),
                )
            )
            for number, text in enumerate(texts)
        ]
        all_are_here.set()
        try:
            ends = await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)
            assert engine.alive
            return ends
        finally:
            await asyncio.to_thread(engine.stop)

    return asyncio.run(asyncio.wait_for(scene(), 20))


@pytest.mark.parametrize("tokens", [2, 30])
def test_turns_that_fit_one_after_the_other_but_not_together_are_all_answered(bench: Workbench, tokens: int) -> None:
    texts = [letter * 120 for letter in "abcd"]
    together = [end.text if isinstance(end, Finished) else end for end in outcomes(bench, texts, tokens)]
    alone = [end.text for text in texts for end in outcomes(bench, [text], tokens) if isinstance(end, Finished)]
    assert together == alone


def test_a_fault_in_a_batch_fails_only_the_turn_that_causes_it(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, (mark,) = bench.runtime.advance, bench.runtime.chat.text("z")
    longest = 0

    def faulty(conversations: Sequence[Conversation], *arguments: object, **options: object) -> object:
        nonlocal longest
        longest = max(longest, len(conversations))
        if any(conversation.log.count(mark) > 20 for conversation in conversations):
            raise ZeroDivisionError("a fault")
        return advance(conversations, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.runtime, "advance", faulty)
    first, broken, last = outcomes(bench, ["One", "z" * 30, "Two"], 4)
    assert longest == 3, "they did not meet: the test proves nothing"
    assert isinstance(broken, ZeroDivisionError)
    assert isinstance(first, Finished) and isinstance(last, Finished)
