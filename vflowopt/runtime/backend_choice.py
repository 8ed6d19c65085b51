"""Which attention backend a device gets.

A backend is only chosen if it computes what stock attention computes: versions differ, and a kernel that reads pages in
another order, or applies another mask, would give wrong answers and no error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from vflowopt.runtime.attention import SdpaBackend
from vflowopt.runtime.backend import Backend, BackendName
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.varlen_attention import VarlenBackend

log = logging.getLogger(__name__)


def _triton(pool: PagePool, heads: int) -> Backend:
    from vflowopt.runtime.ragged_attention import RaggedBackend

    return RaggedBackend(pool, heads)


_BUILDERS: dict[BackendName, tuple[Callable[[PagePool, int], Backend], ...]] = {
    "triton": (_triton,),
    "varlen": (lambda pool, heads: VarlenBackend(pool, "paged"), lambda pool, heads: VarlenBackend(pool, "gathered")),
    "sdpa": (lambda pool, heads: SdpaBackend(pool),),
}
"""For each name, what to try, given the pool and the number of query heads."""

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


def build_backend(name: BackendName, pool: PagePool, heads: int) -> Backend | None:
    """A backend by name; None, with a warning, if it does not work here.

    Args:
        name: which one.
        pool: the pages.
        heads: query heads of a layer.
    """
    why = ""
    for build in _BUILDERS[name]:
        try:
            if name == "sdpa" or _agrees(build, pool, heads):
                return build(pool, heads)
            why = "it computes other numbers"
        except torch.OutOfMemoryError:
            raise
        # What a missing library, a compiler or a kernel raises that does not suit the device or this PyTorch.
        except Exception as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
    log.warning("the attention backend %r is not used: %s", name, why)
    return None


def choose_backend(pool: PagePool, heads: int) -> Backend:
    """The first of :data:`BACKENDS` that works on the pool's device.

    Args:
        pool: the pages.
        heads: query heads of a layer.
    """
    return next(backend for name in BACKENDS if (backend := build_backend(name, pool, heads)) is not None)


@torch.inference_mode()
def _agrees(build: Callable[[PagePool, int], Backend], pool: PagePool, heads: int) -> bool:
    """Whether a backend computes what stock attention computes.

    On a small pool of the same kind: a decode beside a prefill, with page boundaries within both the keys and the new
    tokens, and then a decode step of both sequences as a CUDA graph runs it.
    """
    size, (kv_heads, head_dim) = pool.page_size, pool.keys.shape[1:]
    device, dtype, stored_as = pool.keys.device, pool.dtype, pool.keys.dtype
    trial = PagePool(
        16 * pool.page_bytes,
        page_size=size,
        heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        stored_as=stored_as,
        device=device,
    )
    generator = torch.Generator().manual_seed(0)
    scale = head_dim**-0.5

    def states(tokens: int) -> list[Tensor]:
        widths = (heads, kv_heads, kv_heads)
        return [torch.randn(tokens, width, head_dim, generator=generator).to(device, dtype) for width in widths]

    def close(answer: Tensor, expected: Tensor) -> bool:
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        return torch.allclose(answer.float(), expected.float(), atol=tolerance, rtol=tolerance)

    caches = [StagedCache(trial, [0], 1) for _ in range(2)]
    # In turn, so that neither cache's pages are contiguous.
    for counts in ((size, size), (3, size + 2)):
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve([count])
            slots = cache.stages[0].slots(range(cache.lengths[0], cache.lengths[0] + count))[0]
            _, key, value = states(count)
            trial.write(slots, key, value)
            cache.advance([count])
    ours, stock = build(trial, heads), SdpaBackend(trial)
    counts = (1, 5)
    for cache, count in zip(caches, counts, strict=True):
        cache.reserve([count])
    query, key, value = states(6)
    expected = stock.plan(range(1), caches, counts).attend(0, query, key, value, scale=scale)
    if not close(ours.plan(range(1), caches, counts).attend(0, query, key, value, scale=scale), expected):
        return False
    blocks = max(cache.stages[0].pages.shape[1] for cache in caches)
    tables = torch.tensor(
        [[*row, *row[-1:] * (blocks - len(row))] for cache in caches for row in cache.stages[0].pages.tolist()],
        dtype=torch.int32,
        device=device,
    )
    lens = torch.tensor([cache.lengths[0] + count for cache, count in zip(caches, counts, strict=True)])
    device_lens = lens.to(device, torch.int32)

    def step(backend: Backend) -> Tensor:
        return backend.decodes(2, blocks)(query[:2], key[:2], value[:2], tables, device_lens, scale)

    expected = step(stock)
    return close(step(ours), expected)
