"""The Triton kernels attend to what they should, on any geometry; interpreted where there is no GPU."""

import random
import sys
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.vflowopt.interpreter import DEVICE, repaired_interpreter  # noqa: F401
from vflowopt.runtime.attention import AttentionPlan
from vflowopt.runtime.backend_choice import build_backend, choose_backend
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.ragged_attention import Geometry, RaggedBackend, Tiling
from vflowopt.runtime.ragged_kernels import decode_e4m3, encode_e4m3

LAYERS = 3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about infinities that are meant


@dataclass
class Case:
    """A batch on a random geometry."""

    pool: PagePool
    heads: int
    caches: list[StagedCache]
    counts: list[int]
    backend: RaggedBackend

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE[self.pool.dtype], 1e-5)


def pool_of(
    kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, stored_as: torch.dtype | None = None
) -> PagePool:
    bytes_per_token = 2 * kv_heads * head_dim * (stored_as or dtype).itemsize
    return PagePool(
        (100 * page_size + 1200) * bytes_per_token,
        page_size=page_size,
        heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        stored_as=stored_as,
        device=DEVICE,
    )


def states(pool: PagePool, tokens: int, heads: int) -> Tensor:
    return torch.randn(tokens, heads, pool.keys.shape[2]).to(DEVICE, pool.dtype)


def fill(pool: PagePool) -> None:
    """Random numbers in every slot."""
    for number in range(0, len(pool.keys), 1024):
        slots = torch.arange(number, min(number + 1024, len(pool.keys)), device=DEVICE)
        pool.write(slots, *(states(pool, len(slots), pool.keys.shape[1]) for _ in range(2)))


def case(seed: int, dtype: torch.dtype = torch.float32, stored_as: torch.dtype | None = None) -> Case:
    """Ragged caches of unequal stages whose pages lie in disorder, one of them a fork; decodes and chunks mixed."""
    torch.manual_seed(seed)
    choose = random.Random(seed)
    kv_heads, group = choose.choice([(1, 1), (1, 7), (2, 3), (3, 1), (2, 2), (1, 20)])
    pool = pool_of(kv_heads, choose.choice([8, 24, 64, 72, 80, 96]), choose.choice([1, 4, 5, 16]), dtype, stored_as)
    starts = [(0,), (0, 1, 2), (0, 2), (0, 1)]
    caches = [StagedCache(pool, starts[index % len(starts)], LAYERS) for index in range(4)]
    for _ in range(2):
        for cache in choose.sample(caches, len(caches)):
            counts = sorted((choose.randint(0, 30) for _ in cache.stages), reverse=True)
            cache.reserve(counts)
            cache.advance(counts)
    caches.append(caches[1].fork())
    counts = [1, choose.choice([1, 2]), choose.randint(2, 24), 0, choose.randint(1, 9)]
    order = choose.sample(range(5), 5)
    caches, counts = [caches[place] for place in order], [counts[place] for place in order]
    for cache, count in zip(caches, counts, strict=True):
        cache.reserve([count] * len(cache.stages))
    fill(pool)
    heads = kv_heads * group
    wide = triton.next_power_of_2(max(group, 16))
    chosen = Tiling(wide, choose.choice([16, 32])), Tiling(max(wide, choose.choice([16, 32])), 16)
    backend = RaggedBackend(pool, heads, chosen=chosen, splits=choose.choice([1, 1, 2, 3, 5]))
    return Case(pool, heads, caches, counts, backend)


def expected(each: Case, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention in float64, a token and a head at a time, over the keys and values as they would be stored."""
    outputs, start = [], 0
    group = each.heads // each.pool.keys.shape[1]
    for cache, count in zip(each.caches, each.counts, strict=True):
        stage = cache.stages[cache.stage_of_layer[layer]]
        own = slice(start, start + count)
        start += count
        keys, values = (
            torch.cat([old, each.pool.computed(each.pool.stored(new[own]))]).double().repeat_interleave(group, 1)
            for old, new in zip(stage.read(layer), (key, value), strict=True)
        )
        for token in range(count):
            seen = stage.length + token + 1
            weights = torch.einsum("hd,khd->hk", query[own][token].double(), keys[:seen]).mul(scale).softmax(1)
            outputs.append(torch.einsum("hk,khd->hd", weights, values[:seen]))
    return torch.stack(outputs)


def check(each: Case) -> None:
    for layer in (0, LAYERS - 1):
        query = states(each.pool, sum(each.counts), each.heads)
        kv_heads = each.pool.keys.shape[1]
        both = states(each.pool, sum(each.counts), 2 * kv_heads)
        key, value = both[:, :kv_heads], both[:, kv_heads:]  # not contiguous, as in the fused decoder
        answer_of = expected(each, layer, query, key, value, 0.3)
        plan = each.backend.plan(range(layer, layer + 1), each.caches, each.counts)
        before = each.pool.key_store.clone(), each.pool.value_store.clone()
        answer = plan.attend(layer, query, key, value, scale=0.3)
        assert answer.dtype == each.pool.dtype
        torch.testing.assert_close(answer.double(), answer_of, atol=each.tolerance, rtol=each.tolerance)
        # It writes the same as the plan for every device, and nothing else.
        after = each.pool.key_store.clone(), each.pool.value_store.clone()
        each.pool.key_store.copy_(before[0])
        each.pool.value_store.copy_(before[1])
        places = sorted(range(len(each.counts)), key=lambda place: each.counts[place] != 1)  # decodes first
        starts = [sum(each.counts[:place]) for place in places]
        tokens = [start + n for start, place in zip(starts, places, strict=True) for n in range(each.counts[place])]
        stock = AttentionPlan(
            each.pool,
            range(layer, layer + 1),
            [each.caches[place] for place in places],
            [each.counts[place] for place in places],
        )
        same = stock.attend(layer, query[tokens], key[tokens], value[tokens], scale=0.3)
        torch.testing.assert_close(answer[tokens], same, atol=each.tolerance, rtol=each.tolerance)
        assert torch.equal(each.pool.key_store, after[0]) and torch.equal(each.pool.value_store, after[1])


@pytest.mark.parametrize("seed", range(8))
def test_any_batch_on_any_geometry(seed: int) -> None:
    check(case(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored_as", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_pages_of_any_type(dtype: torch.dtype, stored_as: torch.dtype) -> None:
    check(case(100, dtype, stored_as))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(200, 400))
def test_many_more_batches(seed: int) -> None:
    types = (None, torch.bfloat16, torch.float8_e4m3fn)
    check(case(seed, (torch.float32, torch.bfloat16, torch.float16)[seed % 3], types[seed // 3 % 3]))


@pytest.mark.parametrize("splits", [1, 3])
def test_what_lies_behind_a_context_is_not_read(splits: int) -> None:
    """NaN in all other slots: in other pages, and in the rest of the last one."""
    pool = pool_of(2, 16, 4, torch.float32)
    other, cache = (StagedCache(pool, [0], 1) for _ in range(2))
    other.reserve([4])  # page 0 is not of this sequence
    cache.reserve([11])
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    pool.write(cache.stages[0].slots(range(9))[0], states(pool, 9, 2), states(pool, 9, 2))
    cache.advance([9])
    tiling = Tiling(16, 16)
    backend = RaggedBackend(pool, 4, chosen=(tiling, tiling), splits=splits)
    plan = backend.plan(range(1), [cache], [2])
    assert plan.attend(0, states(pool, 2, 4), states(pool, 2, 2), states(pool, 2, 2), scale=1.0).isfinite().all()


def test_a_batch_splits_only_what_leaves_a_device_idle() -> None:
    geometry = Geometry(pool_of(2, 16, 4, torch.float32), 4)
    geometry._programs = 264
    assert geometry.splits(context_len=100, tiles=1) == 1  # too short
    assert geometry.splits(context_len=1024, tiles=1) == 8
    assert geometry.splits(context_len=10**6, tiles=1) == 32
    assert geometry.splits(context_len=10**6, tiles=40) == 3
    assert geometry.splits(context_len=10**6, tiles=1000) == 1


def test_a_backend_is_only_used_if_it_computes_the_right_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(2, 16, 4, torch.float32)
    right = build_backend("triton", pool, 4)
    assert right is not None and right.name == "triton"
    monkeypatch.setattr("vflowopt.runtime.ragged_attention.math.e", 3.0)  # a wrong factor of the scores
    assert build_backend("triton", pool, 4) is None


@triton.jit
def _encode(target, source, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, encode_e4m3(tl.load(source + place)))


@triton.jit
def _decode(target, source, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, decode_e4m3(tl.load(source + place)))


def test_every_number_is_stored_as_pytorch_stores_it() -> None:
    """Every bfloat16 number, NaN and infinities included, and every pattern back."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().to(DEVICE)
    coded = torch.empty(len(numbers), dtype=torch.uint8, device=DEVICE)
    _encode[(1,)](coded, numbers, len(numbers))
    assert torch.equal(coded, numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8).to(DEVICE)
    decoded = torch.empty(256, dtype=torch.float16, device=DEVICE)
    _decode[(1,)](decoded, patterns, 256)
    there = patterns.view(torch.float8_e4m3fn).to(torch.float16)
    torch.testing.assert_close(decoded, there, atol=0, rtol=0, equal_nan=True)


def test_without_triton_another_backend_is_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = pool_of(2, 16, 4, torch.float32)
    assert choose_backend(pool, 4).name == "triton"
    monkeypatch.setitem(sys.modules, "vflowopt.runtime.ragged_attention", None)  # importing it raises ImportError
    assert choose_backend(pool, 4).name == "sdpa"
    assert "the attention backend 'triton' is not used: ModuleNotFoundError" in caplog.text
