"""The attention of CUDA devices attends to what it should; its kernel is stood in for, so this runs anywhere."""

import random

import pytest
import torch

from tests.vflowopt.varlen_stand_in import VarlenAttention, stand_in
from vflowopt.runtime import varlen_attention
from vflowopt.runtime.attention import AttentionPlan
from vflowopt.runtime.backend_choice import build_backend
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.varlen_attention import PageAccess, VarlenBackend, VarlenPlan

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 6, 2, 8, 4
STARTS: tuple[tuple[int, ...], ...] = ((0,), (0, 2, 4), (0, 3))
LAYERS = 6


def pool(dtype: torch.dtype = torch.float32, device: str = "cpu") -> PagePool:
    budget = 600 * PAGE_SIZE * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
    return PagePool(budget, page_size=PAGE_SIZE, heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype, device=device)


def filled(shared: PagePool, generator: random.Random) -> list[StagedCache]:
    """Caches of different stages and lengths whose pages lie in disorder; one shares pages with another."""
    caches = [StagedCache(shared, STARTS[index % len(STARTS)], LAYERS) for index in range(5)]
    for _ in range(3):
        for cache in generator.sample(caches, len(caches)):
            counts = sorted((generator.randint(0, 9) for _ in cache.stages), reverse=True)
            cache.reserve(counts)
            cache.advance(counts)
    caches.append(caches[1].fork())
    shared.keys.normal_()
    shared.values.normal_()
    return caches


def page_access(shared: PagePool) -> PageAccess | None:
    """How the backend that is chosen by trial reads pages; None if there is none."""
    backend = build_backend("varlen", shared, HEADS)
    assert backend is None or isinstance(backend, VarlenBackend)
    return backend and backend.access


def compare(shared: PagePool, access: PageAccess, seed: int, tolerance: float) -> None:
    """Attend to a ragged batch by both plans; they must agree, and write the same."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    caches = filled(shared, generator)
    # Single tokens first, as the plan for the CPU wants them; the last two bring none that comes this far, and many.
    counts = [1, 1, 1, generator.randint(2, 9), 0, generator.randint(2, 3 * PAGE_SIZE)]
    for cache, count in zip(caches, counts, strict=True):
        cache.reserve([count] * len(cache.stages))
    for layers in (range(0, 2), range(2, 3), range(3, 4), range(4, 6)):
        theirs = AttentionPlan(shared, layers, caches, counts)
        ours = VarlenPlan(shared, layers, caches, counts, access=access)
        for layer in layers:
            query, key, value = (
                torch.randn(sum(counts), heads, HEAD_DIM).to(shared.keys) for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            before = shared.keys.clone(), shared.values.clone()
            expected = theirs.attend(layer, query, key, value, scale=0.3)
            written = shared.keys.clone(), shared.values.clone()
            shared.keys.copy_(before[0])
            shared.values.copy_(before[1])
            answer = ours.attend(layer, query, key, value, scale=0.3)
            torch.testing.assert_close(answer, expected, atol=tolerance, rtol=tolerance)
            assert torch.equal(shared.keys, written[0]) and torch.equal(shared.values, written[1])


@pytest.mark.parametrize("access", ["paged", "gathered"])
@pytest.mark.parametrize("seed", range(4))
def test_a_ragged_batch_attends_as_on_the_cpu(access: PageAccess, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "varlen_attn", stand_in())
    compare(pool(), access, seed, tolerance=1e-5)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (stand_in(), "paged"),
        (stand_in(page_multiple=256), "gathered"),
        (stand_in(bottom_right=False), None),
    ],
    ids=["flash-3", "flash-2", "masks-otherwise"],
)
def test_a_kernel_is_used_for_what_it_does_right(
    kernel: VarlenAttention, expected: PageAccess | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "varlen_attn", kernel)
    assert page_access(pool(torch.bfloat16)) == expected


def test_an_older_kernel_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_block_table(query: object, key: object, value: object, *bounds: object, scale: float) -> None:
        raise AssertionError("called with what it does not know")

    monkeypatch.setattr(varlen_attention, "varlen_attn", without_block_table)
    assert page_access(pool()) is None


def test_a_pytorch_without_the_kernel_has_no_such_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "varlen_attn", None)
    assert page_access(pool(torch.bfloat16)) is None


def test_there_is_no_such_kernel_on_the_cpu() -> None:
    assert page_access(pool(torch.bfloat16)) is None
