"""Keys and values stored in another type than the model's: smaller, and as exact between ways to the same cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.vflowopt.generation import Chat, picture
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import KV_DTYPES, Runtime
from vflowopt.runtime.offload import OffloadedCache, OffloadError, offload, restore

STRATEGY = Strategy.from_budget(0.1, 6, (0.12, 0.9), grid=3.0)
OTHERS = sorted(set(KV_DTYPES) - {"float32"})


@pytest.fixture(scope="module", params=OTHERS)
def loaded(plain_folder: Path, request: pytest.FixtureRequest) -> Runtime:
    """The tiny model, which computes in float32."""
    return Runtime.load(plain_folder, kv_budget=8 << 20, kv_dtype=request.param)


@pytest.fixture
def other(loaded: Runtime) -> Iterator[Runtime]:
    """The same; after the test no page may still be held."""
    yield loaded
    loaded.pool.check_integrity([])


def test_a_budget_holds_more_tokens(other: Runtime, runtime: Runtime) -> None:
    kept = other.pool.keys.dtype
    assert kept == other.pool.values.dtype != runtime.pool.keys.dtype
    assert other.bytes_per_token() * 4 == runtime.bytes_per_token() * kept.itemsize
    assert other.pool.bytes_total == other.pool.keys.nbytes + other.pool.values.nbytes
    assert other.pool.bytes_total <= 8 << 20


def test_answers_stay_close_to_those_of_full_precision(other: Runtime, runtime: Runtime) -> None:
    chats = [Chat(each, STRATEGY) for each in (other, runtime)]
    for chat in chats:
        chat.ask([picture(80, 80, 0), "hi"], 1)
        chat.sequence.release()
    (near,), (exact,) = (chat.logits for chat in chats)
    assert not torch.equal(near, exact), "it is stored as it was"
    assert torch.cosine_similarity(near, exact, dim=0) > 0.99


def test_neither_chunks_nor_the_batch_change_an_answer(other: Runtime) -> None:
    """What a chunk has just computed is rounded like what a later one reads.

    A number on the edge between two that can be stored may still fall to either side: that moves a logit by 1e-3 at
    most. Without the rounding they move by 3e-3 at least.
    """
    chats = [Chat(other, STRATEGY) for _ in range(3)]
    whole, chunked, batched = (chat.sequence for chat in chats)
    items = other.chat.turn(0, [chats[0]._compressed(picture(80, 80, 0)), "a question of some length"])
    expected = other.extend(whole, items)
    assert expected is not None
    chunked.log.extend(items)
    logits = None
    while chunked.num_cached_items < len(chunked.log):
        (logits,) = other.advance([chunked], [5])
    assert logits is not None
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)
    batched.log.extend(items)
    fork = whole.fork()
    fork.log.append(7)
    in_batch, after = other.advance([batched, fork])
    assert in_batch is not None and after is not None
    torch.testing.assert_close(in_batch, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(other.decode([whole], [7])[0], after, atol=2e-3, rtol=0)
    for sequence in (whole, chunked, batched, fork):
        sequence.release()


def test_an_offloaded_cache_comes_back_bit_by_bit(other: Runtime, tmp_path: Path) -> None:
    undisturbed, parked, filed = (Chat(other, STRATEGY) for _ in range(3))
    for chat in (undisturbed, parked, filed):
        chat.ask([picture(100, 70, 1), "first"], 3)
    held = filed.sequence.cache.bytes_held
    memory, file = offload(parked.sequence), tmp_path / "cache.safetensors"
    offload(filed.sequence).save(file)
    assert memory.nbytes <= held and file.stat().st_size < held + 4096
    restore(parked.sequence, memory)
    restore(filed.sequence, OffloadedCache.load(file))
    expected = undisturbed.ask(["second"], 4)
    for chat in (parked, filed):
        assert chat.ask(["second"], 4) == expected
        assert all(torch.equal(*pair) for pair in zip(chat.logits, undisturbed.logits, strict=True))
    for chat in (undisturbed, parked, filed):
        chat.sequence.release()


def test_a_cache_in_another_type_is_refused(other: Runtime, runtime: Runtime) -> None:
    there, here = Chat(runtime, STRATEGY), Chat(other, STRATEGY)
    there.ask(["first"], 2)
    here.sequence.log.extend(there.sequence.log)
    offloaded = offload(there.sequence)
    with pytest.raises(OffloadError, match="stored as"):
        restore(here.sequence, offloaded)
    assert not here.sequence.resident


def test_it_is_part_of_the_revision(other: Runtime, runtime: Runtime, plain_folder: Path) -> None:
    assert other.revision != runtime.revision
    assert runtime.earlier_revisions() and runtime.revision not in other.earlier_revisions()
    assert not other.earlier_revisions() & runtime.earlier_revisions()
    named = Runtime.load(plain_folder, kv_budget=1 << 20, kv_dtype="float32")
    assert named.revision == runtime.revision


def test_what_fp8_cannot_hold_becomes_its_largest_number(plain_folder: Path) -> None:
    pool = Runtime.load(plain_folder, kv_budget=1 << 20, kv_dtype="fp8_e4m3").pool
    states = torch.tensor([1e4, -1e4, 448.0, 0.0, 2.0**-9, 1.06]).repeat(pool.keys.shape[1] * pool.keys.shape[2], 1)
    states = states.T.reshape(6, *pool.keys.shape[1:])
    pool.write(torch.arange(6), states, states)
    keys, values = pool.read(torch.arange(6))
    assert keys[:, 0, 0].tolist() == [448.0, -448.0, 448.0, 0.0, 2.0**-9, 1.0]
    assert torch.equal(keys, values)
