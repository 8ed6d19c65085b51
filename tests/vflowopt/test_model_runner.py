"""Reused caches, receipts and rollbacks: what the runtime promises beyond the unpruned answer."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vflowopt.generation import Chat, picture
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Sequence

NEW_TOKENS = 6


def tenth(**fields: object) -> Strategy:
    """Three stages of six layers, a tenth of the visual tokens in the mean."""
    return Strategy.from_budget(0.1, 6, (0.12, 0.9), threshold=1.0, alpha=0.1, **{"grid": 3.0, **fields})  # type: ignore[arg-type]


@pytest.fixture
def chat(runtime: Runtime) -> Iterator[Chat]:
    chat = Chat(runtime, tenth())
    yield chat
    chat.sequence.release()


@pytest.mark.parametrize(
    "strategy",
    [tenth(), tenth(positions="renumbered"), tenth(grid=None), Strategy((0, 1, 3, 5), (0.9, 0.6, 0.5, 0.3))],
    ids=["preset-like", "renumbered", "no-recycling", "four-stages"],
)
def test_a_reused_cache_answers_like_a_recomputed_one(runtime: Runtime, strategy: Strategy) -> None:
    turns = [[picture(100, 60, 1), "what?"], ["one"], [picture(56, 120, 2), "two"], ["three"], ["four"]]
    reused, recomputed = Chat(runtime, strategy), Chat(runtime, strategy)
    for turn in turns:
        recomputed.sequence.release()
        assert reused.ask(turn, NEW_TOKENS) == recomputed.ask(turn, NEW_TOKENS)
    for held, again in zip(reused.logits, recomputed.logits, strict=True):
        torch.testing.assert_close(held, again, atol=1e-4, rtol=0)
    reused.sequence.release()
    recomputed.sequence.release()


def test_a_picture_ahead_of_its_question_equals_one_inside_the_turn(runtime: Runtime) -> None:
    ahead, inside = Chat(runtime, tenth()), Chat(runtime, tenth())
    ahead.look(picture(90, 70, 3))
    ahead.look(picture(56, 56, 4))
    cached = ahead.sequence.num_cached_items
    assert ahead.ask(["and?"], NEW_TOKENS) == inside.ask([picture(90, 70, 3), picture(56, 56, 4), "and?"], NEW_TOKENS)
    assert cached > 2, "the pictures were not read ahead"
    for first, second in zip(ahead.logits, inside.logits, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    ahead.sequence.release()
    inside.sequence.release()


def test_a_batch_equals_its_members(runtime: Runtime) -> None:
    """Sequences of unequal length and strategy, decoded together and alone."""
    chats = [Chat(runtime, strategy) for strategy in (tenth(), Strategy.full(), tenth(), tenth(grid=None))]
    for index, chat in enumerate(chats):
        chat.ask([picture(56 + 20 * index, 80, index), "go" * (index + 1)], index + 1)
        chat.sequence.log.append(65 + index)
        runtime.extend(chat.sequence, [])
    marks = [chat.sequence.checkpoint() for chat in chats]
    together = runtime.decode([chat.sequence for chat in chats], [70, 71, 72, 73])
    for index, (chat, mark) in enumerate(zip(chats, marks, strict=True)):
        chat.sequence.rollback(mark)
        alone = runtime.decode([chat.sequence], [70 + index])[0]
        torch.testing.assert_close(together[index], alone, atol=1e-4, rtol=0)
        chat.sequence.release()


def test_kept_tokens_keep_positions_embeddings_and_structure(runtime: Runtime) -> None:
    shown = Picture.from_pixels(picture(112, 112, 5))
    (full,) = runtime.compress([shown], Strategy.full())
    (image,) = runtime.compress([shown], tenth())
    structural = image.layout.structural.nonzero()[:, 0]
    assert len(structural) == 8
    for earlier, later in zip(image.kept, image.kept[1:], strict=False):
        assert set(later.tolist()) <= set(earlier.tolist())
    for kept in image.kept:
        assert set(structural.tolist()) <= set(kept.tolist())
    assert torch.equal(image.positions, image.kept[0])
    assert image.span == image.tokens == full.tokens == len(full.kept[0])
    plain = ~torch.isin(image.kept[0], image.recycled)
    assert torch.equal(image.embeddings[plain], full.embeddings[image.kept[0][plain]])
    assert len(image.recycled) > 0


def test_renumbered_positions_close_the_gaps(runtime: Runtime) -> None:
    (image,) = runtime.compress([Picture.from_pixels(picture(112, 112, 5))], tenth(positions="renumbered"))
    assert image.positions.tolist() == list(range(len(image.kept[0])))
    assert image.span == len(image.kept[0]) < image.tokens


def test_text_is_never_pruned_and_lengths_agree_with_the_tensors(chat: Chat) -> None:
    chat.ask([picture(112, 112, 6), "some words"], NEW_TOKENS)
    sequence = chat.sequence
    (image,) = [item for item in sequence.log if isinstance(item, CompressedImage)]
    text = sequence.num_cached_items - 1
    assert [length - text for length in sequence.cache.lengths] == [len(kept) for kept in image.kept]
    for stage in sequence.cache.stages:
        for layer in stage.layers:
            keys, values = stage.read(layer)
            assert len(keys) == len(values) == stage.length
            assert keys.isfinite().all()
            assert (keys.flatten(1).abs().sum(1) > 0).all()
    tokens_full = text + image.tokens
    assert sequence.cached.position == tokens_full
    assert sequence.kv_bytes == len(sequence.cache.owned_pages()) * sequence.cache.pool.page_bytes
    assert sequence.kv_bytes_full == -(-tokens_full // 16) * 6 * sequence.cache.pool.page_bytes


def test_rollback_forgets_a_turn_entirely(chat: Chat, runtime: Runtime) -> None:
    chat.ask([picture(80, 80, 7), "first"], NEW_TOKENS)
    mark, held, turns = chat.sequence.checkpoint(), runtime.pool.bytes_used, chat.turns
    undisturbed = chat.ask(["second"], NEW_TOKENS)
    chat.sequence.rollback(mark)
    chat.turns = turns
    assert runtime.pool.bytes_used == held
    chat.ask(["something else, much longer than a page of sixteen tokens", picture(60, 60, 8)], NEW_TOKENS)
    chat.sequence.rollback(mark)
    chat.turns = turns
    assert runtime.pool.bytes_used == held
    assert chat.ask(["second"], NEW_TOKENS) == undisturbed


def test_rollback_after_a_release_is_right(chat: Chat) -> None:
    chat.ask([picture(80, 80, 7), "first"], NEW_TOKENS)
    mark, turns = chat.sequence.checkpoint(), chat.turns
    undisturbed = chat.ask(["second"], NEW_TOKENS)
    chat.sequence.rollback(mark)
    chat.turns = turns
    chat.sequence.release()
    chat.ask(["other"], NEW_TOKENS)  # rebuilds
    chat.sequence.rollback(mark)
    chat.turns = turns
    assert chat.ask(["second"], NEW_TOKENS) == undisturbed


def test_a_pool_too_small_refuses_and_changes_nothing(plain_folder: Path) -> None:
    page = 2 * 16 * 2 * 16 * 4
    runtime = Runtime.load(plain_folder, kv_budget=40 * page)
    chat = Chat(runtime, Strategy.full())
    chat.ask(["hello"], 2)
    items, used = list(chat.sequence.log), runtime.pool.bytes_used
    lengths = chat.sequence.cache.lengths
    with pytest.raises(PoolExhausted) as refused:
        chat.ask([picture(112, 112, 1), "too much"], 2)
    assert refused.value.needed > refused.value.free
    assert (chat.sequence.log, runtime.pool.bytes_used) == (items, used)
    assert chat.sequence.cache.lengths == lengths
    assert chat.ask(["bye"], 2)
    chat.sequence.release()
    runtime.pool.check_integrity([])


def test_a_batch_that_does_not_fit_changes_none_of_its_members(plain_folder: Path) -> None:
    page = 2 * 16 * 2 * 16 * 4
    runtime = Runtime.load(plain_folder, kv_budget=18 * page)
    sequences = [runtime.start(Strategy.full()) for _ in range(2)]
    for sequence in sequences:
        runtime.extend(sequence, list(range(16)))  # one full page in each of six layers
    before = [sequence.checkpoint() for sequence in sequences]
    with pytest.raises(PoolExhausted):
        runtime.decode(sequences, [1, 2])
    assert [sequence.checkpoint() for sequence in sequences] == before
    assert runtime.pool.bytes_used == 12 * page
    runtime.decode(sequences[:1], [1])


def test_a_failure_of_the_model_changes_nothing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = runtime.start(Strategy.full())
    expected = runtime.extend(sequence, list(range(16)))
    before, used = sequence.checkpoint(), runtime.pool.bytes_used
    for part in ("head", "decoder"):
        with monkeypatch.context() as patch:
            patch.setattr(runtime.model, part, None)
            with pytest.raises((TypeError, AttributeError)):
                runtime.decode([sequence], [1])
        assert (sequence.checkpoint(), runtime.pool.bytes_used) == (before, used)
    sequence.release()
    assert torch.equal(runtime.extend(sequence, []), expected)  # type: ignore[arg-type]
    sequence.release()


def test_what_goes_wrong_in_one_conversation_stays_there(plain_folder: Path) -> None:
    """Numbers that overflowed in one cache, of half precision say, reach no other of the batch."""
    runtime = Runtime.load(plain_folder, kv_budget=1 << 20)
    sequences = [runtime.start(Strategy.full()) for _ in range(3)]
    for index, sequence in enumerate(sequences):
        runtime.extend(sequence, list(range(5 + 20 * index)))
    broken = torch.ones(len(runtime.pool.keys), dtype=torch.bool)
    for sequence in sequences[1:]:
        stage = sequence.cache.stages[0]
        broken[stage.slots(range(runtime.pool.page_size * len(stage.block_table))).flatten()] = False
    runtime.pool.keys[broken] = runtime.pool.values[broken] = torch.nan
    logits = runtime.decode(sequences, [1, 2, 3])
    assert logits.isfinite().all(1).tolist() == [False, True, True]


def test_a_chunk_may_vanish_on_its_way(runtime: Runtime) -> None:
    """Token by token and alone, so that some steps have nothing left for the later stages."""
    strategy = Strategy((0, 1, 3, 5), (0.9, 0.6, 0.5, 0.3))
    (image,) = runtime.compress([Picture.from_pixels(picture(100, 60, 1))], strategy)
    assert (image.last_stages == 0).any()
    whole, chunked = runtime.start(strategy), runtime.start(strategy)
    expected = runtime.extend(whole, [1, 2, image, 3])
    chunked.log.extend([1, 2, image, 3])
    logits = None
    while logits is None:
        (logits,) = runtime.advance([chunked], [1])
    assert expected is not None
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert chunked.cache.lengths == whole.cache.lengths
    whole.release()
    chunked.release()


@pytest.mark.parametrize("chunk", [1, 3, 16, 50])
def test_a_prefill_in_chunks_equals_one_in_a_piece(runtime: Runtime, chunk: int) -> None:
    """Chunks cut pictures wherever they fall, beside other sequences that decode meanwhile."""
    (image,) = runtime.compress([Picture.from_pixels(picture(112, 80, 4))], tenth())
    items = [*range(10, 19), image, *range(30, 40), image, 7]
    whole, chunked, beside = (runtime.start(tenth()) for _ in range(3))
    expected = runtime.extend(whole, items)
    runtime.extend(beside, [5, 6])
    chunked.log.extend(items)
    logits = None
    while logits is None:
        beside.log.append(9)
        logits, other = runtime.advance([chunked, beside], [chunk, None])
        assert other is not None
    assert chunked.cached == whole.cached
    assert chunked.cache.lengths == whole.cache.lengths
    assert expected is not None
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for sequence in (whole, chunked, beside):
        sequence.release()


def test_a_fork_shares_pages_and_then_goes_its_own_way(runtime: Runtime) -> None:
    origin = Chat(runtime, tenth())
    origin.ask([picture(112, 112, 1), "what?"], NEW_TOKENS)
    alone = origin.sequence.kv_bytes
    fork = Chat(runtime, tenth())
    fork.sequence, fork.turns = origin.sequence.fork(), origin.turns
    assert runtime.pool.bytes_used == alone == fork.sequence.kv_bytes
    first, second = origin.ask(["one way"], NEW_TOKENS), fork.ask(["another way"], NEW_TOKENS)
    assert alone < runtime.pool.bytes_used < origin.sequence.kv_bytes + fork.sequence.kv_bytes
    runtime.pool.check_integrity([origin.sequence.cache, fork.sequence.cache])
    for asked, answer in (("one way", first), ("another way", second)):
        again = Chat(runtime, tenth())
        again.ask([picture(112, 112, 1), "what?"], NEW_TOKENS)
        assert again.ask([asked], NEW_TOKENS) == answer
        again.sequence.release()
    origin.sequence.release()
    assert fork.ask(["and on"], NEW_TOKENS)
    fork.sequence.release()


def test_nothing_to_run_is_an_error(runtime: Runtime) -> None:
    sequence = runtime.start(Strategy.full())
    with pytest.raises(ValueError, match="nothing to run"):
        runtime.extend(sequence, [])


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["text", "picture", "rollback", "release", "decode", "fork", "chunk"]), max_size=12),
    data=st.data(),
)
def test_any_order_of_operations_leaves_an_answer_like_a_fresh_one(
    shared_runtime: Runtime, steps: list[str], data: st.DataObject
) -> None:
    runtime = shared_runtime
    (image,) = runtime.compress([Picture.from_pixels(picture(60, 100, 9))], tenth())
    sequence, fresh, marks = runtime.start(tenth()), runtime.start(tenth()), []
    forks: list[Sequence] = []
    try:
        for step in steps:
            marks.append(sequence.checkpoint())
            if step == "text":
                runtime.extend(sequence, data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=20)))
            elif step == "picture":
                runtime.extend(sequence, [image], want_logits=False)
            elif step == "decode" and sequence.num_cached_items == len(sequence.log) > 0:
                runtime.decode([sequence], [data.draw(st.integers(0, 200))])
            elif step == "release":
                sequence.release()
            elif step == "fork":
                # The fork goes on; what it came from stays, and goes its own way, too.
                forks.append(sequence)
                sequence = sequence.fork()
                runtime.extend(forks[-1], [data.draw(st.integers(0, 200))])
            elif step == "chunk" and sequence.pending_tokens + len(sequence.log) > 0:
                sequence.log.append(image)
                runtime.advance([sequence], [data.draw(st.integers(1, 9))])
            elif step == "rollback":
                place = data.draw(st.integers(0, len(marks) - 1))
                sequence.rollback(marks[place])
                del marks[place + 1 :]
            runtime.pool.check_integrity([each.cache for each in (sequence, *forks)])
        expected = runtime.extend(fresh, [*sequence.log, 33])
        answer = runtime.extend(sequence, [33])
        assert answer is not None and expected is not None
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=0)
        assert sequence.position == fresh.position
    finally:
        for each in (fresh, sequence, *forks):
            each.release()
    runtime.pool.check_integrity([])


def test_importance_finds_the_spot(runtime: Runtime) -> None:
    """A picture flat but for one textured spot: the entropy term alone puts the maximum there, in both grids."""
    pixels = np.full((112, 112, 3), 128, np.uint8)
    pixels[70:84, 28:42] = np.random.default_rng(0).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    strategy = Strategy.from_budget(0.3, 6, (0.3, 1.0), alpha=1.0)
    (image,) = runtime.compress([Picture.from_pixels(pixels)], strategy)
    for grid in (0, 1):
        inside = (image.layout.grid == grid) & ~image.layout.structural
        best = int(image.importance.masked_fill(~inside, -1).argmax())
        left, top, right, bottom = image.layout.boxes[best].tolist()
        assert left <= 35 <= right and top <= 77 <= bottom


def test_states_are_what_the_head_reads_wherever_one_looks(runtime: Runtime) -> None:
    strategy = tenth()
    (image,) = runtime.compress([Picture.from_pixels(picture(60, 90, 2))], strategy)
    logs = [[65, image, 66, 67, 68], [70, 71, image, 72, 73]]
    looks = [[0, 2, 4], [4]]
    whole = [runtime.start(strategy) for _ in logs]
    for sequence, log in zip(whole, logs, strict=True):
        sequence.log.extend(log)
    states = runtime.states(whole, looks)
    assert [len(each) for each in states] == [3, 1]
    for log, places, seen in zip(logs, looks, states, strict=True):
        for place, state in zip(places, seen, strict=True):
            alone = runtime.start(strategy)
            logits = runtime.extend(alone, log[: place + 1])
            with torch.inference_mode():
                torch.testing.assert_close(runtime.model.head(state), logits, atol=1e-4, rtol=0)
            alone.release()
    # They ran like any other: the next token finds them cached.
    assert [sequence.pending_tokens for sequence in whole] == [0, 0]
    whole[0].log.append(69)
    for place in (1, 4, 6):  # a picture, a token run before, nothing
        with pytest.raises(ValueError, match=f"item {place} of the log"):
            runtime.states(whole[:1], [[place]])
    assert whole[0].pending_tokens == 1
    for sequence in whole:
        sequence.release()
    runtime.pool.check_integrity([])
