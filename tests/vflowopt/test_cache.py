"""The page pool and the staged cache by themselves."""

import pytest
import torch

from vflowopt.runtime.cache import PagePool, PoolExhausted, StagedCache, reserve

PAGE = 4


def pool(pages: int = 40) -> PagePool:
    size = 2 * PAGE * 2 * 8 * 4
    return PagePool(pages * size + 5, page_size=PAGE, heads=2, head_dim=8, dtype=torch.float32, device="cpu")


def test_a_pool_holds_whole_pages_of_its_budget() -> None:
    assert (pool().pages, pool().bytes_total) == (40, 40 * 512)
    with pytest.raises(ValueError, match="does not hold one page"):
        pool(pages=0)


def test_what_is_written_is_read_back_per_layer_and_stage() -> None:
    cache = StagedCache(pool(), (0, 2), 5)
    written = {}
    for _ in range(3):
        counts = (5, 3)
        cache.reserve(counts)
        for layer in range(5):
            stage = cache.stages[cache.stage_of_layer[layer]]
            key, value = torch.randn(2, counts[cache.stage_of_layer[layer]], 2, 8)
            slots = stage.slots(range(stage.length, stage.length + len(key)))[layer - stage.layers.start]
            cache.pool.keys[slots], cache.pool.values[slots] = key, value
            written.setdefault(layer, []).append((key, value))
        cache.advance(counts)
    assert cache.lengths == (15, 9)
    for layer, parts in written.items():
        stage = cache.stages[cache.stage_of_layer[layer]]
        keys, values = stage.read(layer)
        assert torch.equal(keys, torch.cat([key for key, _ in parts]))
        assert torch.equal(values, torch.cat([value for _, value in parts]))
    cache.truncate((6, 2))
    keys, _ = cache.stages[0].read(1)
    assert torch.equal(keys, torch.cat([key for key, _ in written[1]])[:6])


def test_only_the_pages_needed_are_held() -> None:
    shared = pool()
    cache = StagedCache(shared, (0, 2, 4), 6)
    cache.reserve((9, 5, 4))
    assert len(cache.owned_pages()) == 2 * (3 + 2 + 1)
    cache.advance((9, 5, 4))
    cache.reserve((3, 3, 0))
    assert len(cache.owned_pages()) == 2 * (3 + 2 + 1)
    cache.truncate((4, 0, 4))
    assert cache.bytes_held == shared.bytes_used == 2 * (1 + 0 + 1) * shared.page_bytes
    shared.check_integrity([cache])
    cache.free()
    cache.free()
    assert shared.bytes_used == 0
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate((1, 0, 0))


def test_exhaustion_takes_nothing() -> None:
    shared = pool(pages=10)
    cache = StagedCache(shared, (0, 1), 2)
    with pytest.raises(PoolExhausted, match="10 of 10 pages free but 12 are needed"):
        cache.reserve((24, 24))
    assert (shared.free_pages, cache.lengths) == (10, (0, 0))


def test_integrity_finds_lost_and_doubled_pages() -> None:
    shared = pool()
    cache = StagedCache(shared, (0,), 2)
    cache.reserve((4,))
    with pytest.raises(AssertionError, match="references differ"):
        shared.check_integrity([])
    with pytest.raises(AssertionError, match="references differ"):
        shared.check_integrity([cache, cache])


def test_room_is_made_in_all_caches_or_in_none() -> None:
    shared = pool(pages=7)
    first = StagedCache(shared, (0,), 2)
    first.reserve([6])
    first.advance([6])
    second, third = first.fork(), first.fork()
    # All three write into the block that they share: two of them need a copy of it, which only one gets.
    shared.acquire(1)
    with pytest.raises(PoolExhausted, match="2 of 7 pages free but 4 are needed"):
        reserve([first, second, third], [[1], [1], [1]])
    assert shared.free_pages == 2
    assert first.owned_pages() == second.owned_pages() == third.owned_pages()
    # The last one of those who share a block needs no copy.
    third.free()
    reserve([first, second], [[1], [1]])
    assert shared.free_pages == 0
    assert len({*first.owned_pages(), *second.owned_pages()}) == 6
