"""The loop that generates an answer, used alone."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.vflowopt.generation import Chat, picture
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.generate import FinishReason, Generated, generate
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import SamplingOptions
from vflowopt.runtime.sequence import Item, Sequence

QUARTER = Strategy.preset(0.25, 6)
PIXELS = picture(60, 110, 3)


def whole(generating: Generator[str, None, Generated]) -> tuple[list[str], Generated]:
    """The pieces of an answer, and the answer."""
    pieces: list[str] = []
    while True:
        try:
            pieces.append(next(generating))
        except StopIteration as end:
            return pieces, end.value


@pytest.fixture
def sequence(runtime: Runtime) -> Any:
    sequence = runtime.start(QUARTER)
    yield sequence
    sequence.release()


@pytest.fixture
def items(runtime: Runtime) -> list[Item]:
    (image,) = runtime.compress([Picture.from_pixels(PIXELS)], QUARTER)
    return runtime.chat.turn(0, [image, "what?"])


def test_two_turns_are_those_of_a_look_at_every_step(runtime: Runtime, sequence: Sequence, items: list[Item]) -> None:
    chat = Chat(runtime, QUARTER)
    for turn, parts in enumerate(([PIXELS, "what?"], ["and?"])):
        expected = chat.ask(parts, 8)
        if turn:
            items = runtime.chat.turn(turn, ["and?"])
        begin = len(sequence.log) + len(items)
        pieces, answer = whole(generate(runtime, sequence, items, max_new_tokens=8))
        assert list(answer.tokens) == expected == sequence.log[begin:]
        assert answer.text == "".join(pieces) == runtime.chat.decode(expected)
        assert all(pieces)
    chat.sequence.release()


def test_the_most_tokens_and_the_fewest(runtime: Runtime, sequence: Sequence, items: list[Item]) -> None:
    _, answer = whole(generate(runtime, sequence, items, max_new_tokens=5, min_new_tokens=5))
    assert (answer.num_generated, len(answer.tokens), answer.finish_reason) == (5, 5, FinishReason.LENGTH)


def test_an_answer_that_the_model_ends(runtime: Runtime, sequence: Sequence, items: list[Item]) -> None:
    _, answer = whole(generate(runtime, sequence, items, max_new_tokens=4, min_new_tokens=4))
    again, stop_ids = runtime.start(QUARTER), runtime.chat.stop_ids
    try:
        runtime.chat.stop_ids = frozenset(answer.tokens[2:3])
        _, ended = whole(generate(runtime, again, items, max_new_tokens=4))
    finally:
        runtime.chat.stop_ids = stop_ids
        again.release()
    kept = answer.tokens.index(answer.tokens[2])
    assert ended.finish_reason is FinishReason.STOP and ended.tokens == answer.tokens[:kept]
    assert ended.num_generated == kept + 1, "the token that ended it is counted, but not part of the log"


def test_a_stop_string_is_not_part_of_the_answer(runtime: Runtime, sequence: Sequence, items: list[Item]) -> None:
    _, answer = whole(generate(runtime, sequence, items, max_new_tokens=8, min_new_tokens=8))
    stop = answer.text[3:5]
    again = runtime.start(QUARTER)
    pieces, cut = whole(generate(runtime, again, items, max_new_tokens=8, min_new_tokens=8, stop=[stop]))
    assert cut.finish_reason is FinishReason.STOP_STRING
    assert cut.text == "".join(pieces) == answer.text[: answer.text.index(stop)]
    assert tuple(again.log[len(items) :]) == cut.tokens, "the model does not remember what nobody was shown"
    again.release()


def test_a_seed_repeats_an_answer(runtime: Runtime, sequence: Sequence, items: list[Item]) -> None:
    def drawn(seed: int) -> tuple[int, ...]:
        fresh, sampling = runtime.start(QUARTER), SamplingOptions(temperature=1.0, seed=seed)
        _, answer = whole(generate(runtime, fresh, items, max_new_tokens=12, min_new_tokens=12, sampling=sampling))
        fresh.release()
        return answer.tokens

    assert drawn(1) == drawn(1) != drawn(2)


def test_closing_it_early_leaves_the_sequence_as_it_was(
    runtime: Runtime, sequence: Sequence, items: list[Item]
) -> None:
    whole(generate(runtime, sequence, items, max_new_tokens=4))
    log, cached, held = list(sequence.log), sequence.cached, runtime.pool.bytes_used
    generating = generate(runtime, sequence, runtime.chat.turn(1, ["and?"]), max_new_tokens=100, min_new_tokens=100)
    next(generating)
    assert len(sequence.log) > len(log)
    generating.close()
    assert (sequence.log, sequence.cached, runtime.pool.bytes_used) == (log, cached, held)


def test_a_pool_too_small_leaves_the_sequence_as_it_was(plain_folder: Path, items: list[Item]) -> None:
    small = Runtime.load(plain_folder, kv_budget=1 << 14)
    sequence = small.start(QUARTER)
    with pytest.raises(PoolExhausted):
        whole(generate(small, sequence, items, max_new_tokens=4))
    assert not sequence.log and small.pool.bytes_used == 0
