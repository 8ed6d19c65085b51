"""Attention backends: which code computes attention over the paged cache, on which device.

- ``"triton"``: kernels of our own that read pages of any size in place; see
  :mod:`vflowopt.runtime.ragged_attention`. The first choice on CUDA.
- ``"varlen"``: PyTorch's variable-length flash attention; see :mod:`vflowopt.runtime.varlen_attention`. The second
  choice on CUDA, for half precision.
- ``"sdpa"``: PyTorch's scaled dot-product attention, on every device; see :mod:`vflowopt.runtime.attention`. On the CPU
  a compiled kernel computes its decodes.

On a device, a backend is only chosen if it computes what ``"sdpa"`` computes: versions differ, and a kernel that reads
pages in another order, or applies another mask, would give wrong answers and no error.

A further backend, such as one with FlashInfer's kernels, is a class with the methods of :class:`Backend`, and an entry
in ``_BUILDERS``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from vflowopt.runtime.attention import AttentionPlan, Plan
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.decode_kernel import DecodeKernel
from vflowopt.runtime.varlen_attention import PageAccess, VarlenDecodes, VarlenPlan

log = logging.getLogger(__name__)

BackendName = Literal["triton", "varlen", "sdpa"]


class DecodeAttention(Protocol):
    """Attention of one new token of each of a fixed number of sequences, which a CUDA graph can capture.

    It runs the same operations whatever is in ``pages`` and ``context_lens``, and does not wait for the device.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, pages: Tensor, context_lens: Tensor, scale: float
    ) -> Tensor:
        """Write the new keys and values to a layer, then attend to each sequence's context.

        Args:
            query: [batch, heads, head_dim].
            key: [batch, kv_heads, head_dim].
            value: [batch, kv_heads, head_dim].
            pages: int32 [batch, blocks], the block tables; a row is padded with its own last page.
            context_lens: int32 [batch], the tokens of each context, the new one included.
            scale: factor of the scores.

        Returns:
            [batch, heads, head_dim].
        """
        ...


class Backend(Protocol):
    """Attention over the pages of one pool.

    Attributes:
        name: what it is called.
        in_place: whether decodes read pages where they are, and not a copy of them.
    """

    name: BackendName
    in_place: bool

    def plan(self, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]) -> Plan:
        """Plan a batch; see :class:`vflowopt.runtime.attention.AttentionPlan` for the arguments."""
        ...

    def decodes(self, batch: int, blocks: int) -> DecodeAttention:
        """Attention for decode steps of ``batch`` sequences with at most ``blocks`` blocks each."""
        ...


class SdpaBackend:
    """PyTorch's scaled dot-product attention.

    Args:
        pool: the pages.
        kernel: computes the attention of the decodes of a plan; None: PyTorch's attention does.
    """

    name: BackendName = "sdpa"
    in_place = False

    def __init__(self, pool: PagePool, kernel: DecodeKernel | None = None) -> None:
        self._pool = pool
        self._kernel = kernel

    def plan(self, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]) -> Plan:
        """See :meth:`Backend.plan`; decodes come first."""
        return AttentionPlan(self._pool, layers, caches, counts, self._kernel)

    def decodes(self, batch: int, blocks: int) -> DecodeAttention:
        """See :meth:`Backend.decodes`."""
        return SdpaDecodes(self._pool, blocks)


class SdpaDecodes:
    """A :class:`DecodeAttention` over copies of the pages.

    Args:
        pool: the pages.
        blocks: the most blocks of a sequence.
    """

    def __init__(self, pool: PagePool, blocks: int) -> None:
        self._pool = pool
        self._places = torch.arange(blocks * pool.page_size, dtype=torch.int32, device=pool.keys.device)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, pages: Tensor, context_lens: Tensor, scale: float
    ) -> Tensor:
        """See :meth:`DecodeAttention.__call__`."""
        pool = self._pool
        batch, kv_heads, head_dim = key.shape
        pool.write(pool.last_slots(pages, context_lens), key, value)
        keys, values = (each.view(batch, -1, kv_heads, head_dim) for each in pool.read_pages(pages.flatten()))
        # The query heads that share a key head stand in for query tokens: one pass over the keys serves them all.
        together = nn.functional.scaled_dot_product_attention(
            query.reshape(batch, kv_heads, -1, head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=(self._places < context_lens[:, None])[:, None, None],
            scale=scale,
        )
        return together.reshape(query.shape)


class VarlenBackend:
    """PyTorch's variable-length flash attention.

    Args:
        pool: the pages.
        access: how the kernel reads them.
    """

    name: BackendName = "varlen"

    def __init__(self, pool: PagePool, access: PageAccess) -> None:
        self._pool = pool
        self.access = access
        self.in_place = access == "paged"

    def plan(self, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]) -> Plan:
        """See :meth:`Backend.plan`."""
        return VarlenPlan(self._pool, layers, caches, counts, access=self.access)

    def decodes(self, batch: int, blocks: int) -> DecodeAttention:
        """See :meth:`Backend.decodes`."""
        return VarlenDecodes(self._pool, batch, blocks, self.access)


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
