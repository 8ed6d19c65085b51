"""The scheduler on turns that meet in one step."""

import asyncio
import threading
import time
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.server.drawing import noise
from tests.server.engine_parts import EngineParts
from vflow_client.v1.conversations_pb2 import Finished
from vflow_server.access.caller import DEFAULT_TENANT
from vflow_server.engine.batch import Scheduled
from vflow_server.engine.encoding_queue import Asking, EncodingQueue
from vflow_server.engine.engine import Engine, Steps, Work
from vflow_server.engine.scheduler import Scheduler
from vflow_server.kv.session_state import SessionState
from vflow_server.sessions.turn import TurnRequest, turn
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.media.video import Video, Visual
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Sequence


class Unwatched:
    """A fidelity monitor that looks at nothing."""

    def chooses(self, *turn: object, **about: object) -> bool:
        return False


def new_parts(model_folder: Path, kv_budget: int) -> Iterator[EngineParts]:
    parts = EngineParts.load(model_folder, kv_budget)
    parts.runtime.chat.stop_ids = frozenset()
    yield parts
    parts.kv.check()
    parts.close()


@pytest.fixture
def parts(model_folder: Path) -> Iterator[EngineParts]:
    """Room for 256 tokens, and nowhere to offload to."""
    yield from new_parts(model_folder, 400 << 10)


@pytest.fixture
def roomy(model_folder: Path) -> Iterator[EngineParts]:
    """Room for everything."""
    yield from new_parts(model_folder, 32 << 20)


@dataclass(frozen=True)
class Asked:
    """A turn to be played in a session of its own."""

    parts: tuple[str | Visual, ...]
    tenant: str = DEFAULT_TENANT
    tokens: int = 1


def outcomes(parts: EngineParts, texts: abc.Sequence[str], tokens: int) -> list[Finished | BaseException]:
    """What becomes of turns with these texts."""
    return play(parts, [Asked((text,), tokens=tokens) for text in texts])


def play(
    parts: EngineParts, turns: abc.Sequence[Asked], ended: Callable[[int], None] = lambda number: None
) -> list[Finished | BaseException]:
    """What becomes of turns whose first step is the same; ``ended`` is called when one is answered."""

    def noted(number: int, asked: Asked) -> Work[str, Finished]:
        def work(emit: Callable[[str], None]) -> Steps[Finished]:
            finished = yield from turn(
                parts.runtime,
                parts.kv,
                parts.images,
                parts.tokenizer,
                SessionState(parts.runtime, Strategy.full(), asked.tenant),
                TurnRequest(asked.parts, asked.tokens),
                emit,
                session_name=f"sessions/s{number}",
                strategy_name="strategies/full",
                accepted=time.perf_counter(),
                monitor=Unwatched(),  # type: ignore[arg-type]
            )
            ended(number)
            return finished

        return work

    async def scene() -> list[Finished | BaseException]:
        engine = Engine(waiting=len(turns), running=len(turns) + 1, schedule=parts.scheduler())
        engine.start()
        holding, all_are_here = threading.Event(), threading.Event()

        def hold() -> None:
            holding.set()
            all_are_here.wait(5)

        engine.call(hold, DEFAULT_TENANT)
        await asyncio.to_thread(holding.wait, 5)
        tickets = [engine.submit(noted(number, asked), asked.tenant) for number, asked in enumerate(turns)]
        all_are_here.set()
        try:
            ends = await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)
            assert engine.alive
            return ends
        finally:
            await asyncio.to_thread(engine.stop)

    return asyncio.run(asyncio.wait_for(scene(), 20))


@pytest.mark.parametrize("tokens", [2, 30])
def test_turns_that_fit_one_after_the_other_but_not_together_are_all_answered(parts: EngineParts, tokens: int) -> None:
    texts = [letter * 120 for letter in "abcd"]
    together = [end.text if isinstance(end, Finished) else end for end in outcomes(parts, texts, tokens)]
    alone = [end.text for text in texts for end in outcomes(parts, [text], tokens) if isinstance(end, Finished)]
    assert together == alone


def test_a_fault_in_a_batch_fails_only_the_turn_that_causes_it(
    parts: EngineParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, (mark,) = parts.runtime.step, parts.runtime.chat.text("z")
    longest = 0

    def faulty(conversations: abc.Sequence[Sequence], *arguments: object, **options: object) -> object:
        nonlocal longest
        longest = max(longest, len(conversations))
        if any(conversation.log.count(mark) > 20 for conversation in conversations):
            raise ZeroDivisionError("a fault")
        return step(conversations, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(parts.runtime, "step", faulty)
    let_meet(3, monkeypatch)
    first, broken, last = outcomes(parts, ["One", "z" * 30, "Two"], 4)
    assert longest == 3, "they did not meet: the test proves nothing"
    assert isinstance(broken, ZeroDivisionError)
    assert isinstance(first, Finished) and isinstance(last, Finished)


def let_meet(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no step begin before so many turns want one, though their texts are tokenized one after the other."""
    run, met = Scheduler._run, False

    def once_all_run(self: Scheduler, forwards: abc.Sequence[Scheduled]) -> None:
        nonlocal met
        met |= len(forwards) == turns
        if met:
            run(self, forwards)

    monkeypatch.setattr(Scheduler, "_run", once_all_run)


def steps_to_answer(parts: EngineParts, turns: abc.Sequence[Asked], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After how many steps of the model each turn is answered. The first step is that of all their prompts."""
    step, steps, answered = parts.runtime.step, 0, [0] * len(turns)

    def counted(*arguments: object, **options: object) -> object:
        nonlocal steps
        steps += 1
        return step(*arguments, **options)  # type: ignore[arg-type]

    def note(number: int) -> None:
        answered[number] = steps

    with monkeypatch.context() as patch:
        patch.setattr(parts.runtime, "step", counted)
        let_meet(len(turns), patch)
        for end in play(parts, turns, note):
            assert isinstance(end, Finished), end
    return answered


def test_thirty_long_prompts_of_a_tenant_cost_another_no_more_than_its_share(
    roomy: EngineParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vflow_server.engine.scheduler.PROMPT_TOKENS", 64)
    many = [Asked(("b" * 200,), "busy") for _ in range(30)]
    (alone,) = steps_to_answer(roomy, [Asked(("q" * 200,), "quiet")], monkeypatch)
    *busy, quiet = steps_to_answer(roomy, [*many, Asked(("q" * 200,), "quiet")], monkeypatch)
    assert alone > 2 and quiet <= 2 * alone + 1  # two tenants: half of each step is the other's
    assert busy == sorted(busy), "first come, first served within a tenant"
    assert busy[0] <= 2 * alone + 1, "nor is the busy one kept waiting"


def test_what_a_tenant_leaves_of_its_share_is_not_lost(roomy: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vflow_server.engine.scheduler.PROMPT_TOKENS", 64)
    (alone,) = steps_to_answer(roomy, [Asked(("b" * 400,), "busy")], monkeypatch)
    *quiet, busy = steps_to_answer(
        roomy, [*[Asked(("q",), name) for name in ("one", "two")], Asked(("b" * 400,), "busy")], monkeypatch
    )
    assert max(quiet) <= 2 and busy <= alone + 2


def once_all_ask(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be encoded before ``count`` tasks have asked."""
    advance, met = EncodingQueue.advance, False

    def gated(self: EncodingQueue, asking: abc.Sequence[Asking], *rest: Any, **options: Any) -> bool:
        nonlocal met
        met |= len(asking) == count
        return met and advance(self, asking, *rest, **options)

    monkeypatch.setattr(EncodingQueue, "advance", gated)


def test_a_video_is_encoded_by_itself(roomy: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three, *frames = (Picture.from_pixels(noise(40, 40, seed)) for seed in range(6))
    clip, other = Video.of(frames, range(3)), Video.of(frames, range(1, 4))
    compressing, encoded = roomy.runtime.compressing, []

    def noted(shown: abc.Sequence[Visual], strategy: Strategy) -> object:
        encoded.append([{one: 1, two: 2, three: 3, clip: "clip", other: "other"}[each] for each in shown])
        return compressing(shown, strategy)

    monkeypatch.setattr(roomy.runtime, "compressing", noted)
    turns = [Asked((visual, "?")) for visual in (one, two, clip, other, three)]
    once_all_ask(len(turns), monkeypatch)
    assert all(isinstance(end, Finished) for end in play(roomy, turns))
    assert encoded == [[1, 2, 3], ["clip"], ["other"]]


def test_tenants_take_turns_with_their_pictures(roomy: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vflow_server.engine.encoding_queue.PICTURES", 1)
    pictures = [Picture.from_pixels(noise(40, 40, seed)) for seed in range(8)]
    owners = {picture.digest: "busy" for picture in pictures[:6]} | {
        picture.digest: "quiet" for picture in pictures[6:]
    }
    compressing, encoded = roomy.runtime.compressing, []

    def noted(shown: abc.Sequence[Picture], strategy: Strategy) -> object:
        encoded.extend(owners[picture.digest] for picture in shown)
        return compressing(shown, strategy)

    monkeypatch.setattr(roomy.runtime, "compressing", noted)
    turns = [Asked((picture, "?"), owners[picture.digest]) for picture in pictures]
    once_all_ask(len(turns), monkeypatch)
    assert all(isinstance(end, Finished) for end in play(roomy, turns))
    assert encoded == ["busy", "quiet"] * 2 + ["busy"] * 4


def prompt_tokens_by_step(
    parts: EngineParts, turns: abc.Sequence[Asked], monkeypatch: pytest.MonkeyPatch
) -> list[list[tuple[int, int]]]:
    """For each step of the model, the tokens cached before and the tokens run of each prompt in it."""
    step, steps = parts.runtime.step, list[list[tuple[int, int]]]()

    def noted(sequences: abc.Sequence[Sequence], limits: abc.Sequence[int], *rest: Any) -> object:
        steps.append(
            [
                (each.cached.position, limit)
                for each, limit in zip(sequences, limits, strict=True)
                if each.pending_tokens > 1
            ]
        )
        return step(sequences, limits, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(parts.runtime, "step", noted)
        assert all(isinstance(end, Finished) for end in play(parts, turns))
    return steps


def test_a_long_prompt_runs_in_few_of_the_steps_beside_the_answers_of_another_tenant(
    roomy: EngineParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vflow_server.engine.scheduler.PROMPT_TOKENS", 32)
    monkeypatch.setattr("vflow_server.engine.scheduler.BESIDE_ANSWERS", 10)
    monkeypatch.setattr(roomy.runtime, "relative_cost", lambda context: 1.0)
    long, answer = "b" * 600, Asked(("q",), "quiet", tokens=80)
    beside = prompt_tokens_by_step(roomy, [answer, Asked((long,), "busy")], monkeypatch)
    # The answer begins in the second step at the latest, and is decoded for 79.
    assert 2 <= sum(map(bool, beside[30:70])) <= 4, "one of ten steps"
    assert sum(map(bool, beside[:30])) >= 4, "what was saved is used at once"
    own = prompt_tokens_by_step(roomy, [answer, Asked((long,), "quiet")], monkeypatch)
    ended = max(place for place, step in enumerate(own) if step)
    assert all(own[ended - 14 : ended]), "a tenant does not wait for its own answers"


def test_a_step_runs_fewer_tokens_behind_a_long_context(roomy: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vflow_server.engine.scheduler.PROMPT_TOKENS", 64)
    monkeypatch.setattr(roomy.runtime, "relative_cost", lambda context: 1.0 + context / 100)
    steps = prompt_tokens_by_step(roomy, [Asked(("b" * 600,))], monkeypatch)
    for ((context, count),) in filter(None, steps[:-1]):
        assert count == 64 // (1 + context / 100)


def test_attention_to_a_context_costs_what_its_products_are(runtime: Runtime) -> None:
    """Twice the tokens before a token are twice what attention takes."""
    cost = runtime.relative_cost
    assert cost(0) == 1.0 and cost(2000) - cost(0) == pytest.approx(2 * (cost(1000) - cost(0))) and cost(1000) > 1.0
