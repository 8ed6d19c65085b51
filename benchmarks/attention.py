"""Attention over ragged pages on a device: the kernels that VFlow has or could have, correct first and then timed.

Every variant attends in one layer of a model's geometry, and writes the new tokens too. Its result is compared with
stock attention in float32; one that is wrong is not timed. On a CUDA device the calls are captured in a graph, as
decode steps are, where that is possible.

On a CPU the Triton kernels need ``TRITON_INTERPRET=1`` and are only rehearsed: the times say nothing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.device import seconds as seconds_of
from benchmarks.table import Row, render, write
from vflowopt.models.loading import DTYPES
from vflowopt.runtime.attention import SdpaBackend
from vflowopt.runtime.backend import Backend
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.varlen_attention import VarlenBackend

_CALLS = 10
"""Calls in a CUDA graph, so that starting it counts little."""


@dataclass(frozen=True)
class Geometry:
    """Heads and pages of a model.

    Attributes:
        heads: query heads of a layer.
        kv_heads: key heads of a layer.
        head_dim: channels of a head.
        page_size: tokens of a page.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 16


GEOMETRIES = {
    "7b": Geometry(28, 4, 128),
    "0.5b": Geometry(14, 2, 64),
    "tiny": Geometry(4, 2, 16, 4),
}


@dataclass(frozen=True)
class Scenario:
    """A batch.

    Attributes:
        name: what it is called.
        contexts: tokens that each sequence has cached.
        counts: new tokens of each sequence.
    """

    name: str
    contexts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def decodes_only(self) -> bool:
        """Whether a CUDA graph runs it."""
        return all(count == 1 for count in self.counts)


def scenarios(size: int) -> list[Scenario]:
    """The batches that are measured.

    Args:
        size: 1 for those of a real model; a larger number divides all lengths.
    """
    draw = random.Random(0)
    pruned = tuple(max(draw.randint(100, 900) // size, 1) for _ in range(32))
    batch = pruned if size == 1 else pruned[:4]
    return [
        Scenario("decode, 32 pruned conversations", batch, (1,) * len(batch)),
        Scenario("decode, one pruned conversation", batch[:1], (1,)),
        Scenario("decode, one long context", (max(32000 // size, 8),), (1,)),
        Scenario("decodes beside a chunk", (*batch[1:], 2000 // size), (*(1,) * (len(batch) - 1), max(512 // size, 3))),
        Scenario("prefill", (0,), (max(2048 // size, 5),)),
    ]


@dataclass(frozen=True)
class Variant:
    """A way to attend.

    Attributes:
        name: what it is called.
        build: makes its backend from a pool and the number of query heads.
        stored_as: type of the pages; None: that of the queries.
    """

    name: str
    build: Callable[[PagePool, int], Backend]
    stored_as: torch.dtype | None = None


def variants(dtype: torch.dtype, geometry: Geometry, *, tilings: bool = True) -> list[Variant]:
    """The variants for a type; what does not exist here fails when it is built.

    Args:
        dtype: type of the queries.
        geometry: heads and pages.
        tilings: whether to try other tilings and splits than the default ones of the Triton kernels.
    """
    found = [
        Variant("triton", _triton()),
        Variant("triton, fp8 pages", _triton(), torch.float8_e4m3fn),
        Variant("sdpa", lambda pool, heads: SdpaBackend(pool)),
        Variant("varlen, gathered", lambda pool, heads: VarlenBackend(pool, "gathered")),
        Variant("varlen, paged", lambda pool, heads: VarlenBackend(pool, "paged")),
        Variant("flex", _flex),
    ]
    if tilings:
        least = max(16, 1 << (geometry.heads // geometry.kv_heads - 1).bit_length())
        for rows, keys, warps, stages in (
            (least, 32, 4, 3),
            (least, 64, 4, 3),
            (least, 128, 4, 2),
            (least, 128, 8, 3),
            (max(least, 64), 32, 4, 3),
            (max(least, 64), 64, 4, 3),
            (max(least, 128), 64, 8, 2),
            (max(least, 128), 64, 8, 3),
        ):
            name = f"triton, tiles of {rows} x {keys}, {warps} warps, {stages} stages"
            found.append(Variant(name, _triton(tiling=(rows, keys, warps, stages))))
        found += [Variant(f"triton, {splits} splits", _triton(splits=splits)) for splits in (1, 4, 16, 64)]
    return found


def rows(
    device: torch.device,
    dtype: torch.dtype,
    geometry: Geometry,
    batches: Sequence[Scenario],
    ways: Sequence[Variant],
    *,
    budget_s: float,
    repeats: int = 15,
) -> Iterator[Row]:
    """Compare variants; yields a row for each scenario and variant as soon as it is measured.

    What the budget leaves no time for is not yielded. The first variant of each scenario comes before the second one of
    any, and so on, so that a short budget measures the most important ones everywhere.

    Args:
        device: where.
        dtype: type of the queries.
        geometry: heads and pages.
        batches: what to attend to.
        ways: how, the most important ones first.
        budget_s: seconds in all; a variant that has begun, and may have to be compiled, is finished.
        repeats: timed runs of each, at most.
    """
    until = time.monotonic() + budget_s
    for way in ways:
        for batch in batches:
            if time.monotonic() >= until:
                return
            yield _measure(device, dtype, geometry, batch, way, repeats)


@torch.inference_mode()
def _measure(
    device: torch.device, dtype: torch.dtype, geometry: Geometry, batch: Scenario, way: Variant, repeats: int
) -> Row:
    row: Row = {"scenario": batch.name, "variant": way.name, "error": None, "ms": None, "low": None, "high": None}
    row |= {"gb_per_s": None, "captured": None, "why_not": None}
    trial = _Trial(device, dtype, geometry, batch, way.stored_as)
    try:
        work = trial.work(way.build(trial.pool, geometry.heads))
        error = float((work().float() - trial.expected).abs().max())
        row["error"] = error
        if error > trial.tolerance:
            return {**row, "why_not": "wrong numbers"}
        call, calls, captured = _captured(work) if device.type == "cuda" else (work, 1, False)
        call()
        times = sorted(1e3 * seconds_of(call, device) / calls for _ in range(repeats))
    # What a missing library, a compiler or a kernel raises; the rest goes on.
    except Exception as error:
        return {**row, "why_not": f"{type(error).__name__}: {error}".partition("\n")[0][:160]}
    middle = statistics.median(times)
    row |= {"ms": middle, "low": times[len(times) // 10], "high": times[-1 - len(times) // 10], "captured": captured}
    return {**row, "gb_per_s": trial.bytes_read / middle / 1e6}


class _Trial:
    """A pool with the caches of a scenario, and the right answer."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        geometry: Geometry,
        batch: Scenario,
        stored_as: torch.dtype | None,
    ) -> None:
        ends = [held + new for held, new in zip(batch.contexts, batch.counts, strict=True)]
        pages = sum(-(-end // geometry.page_size) for end in ends)
        self._batch = batch
        self._scale = geometry.head_dim**-0.5
        # More than is needed, and acquired in turn: pages lie in disorder, as they do after a while.
        self.pool = self._pool(geometry, 2 * pages + 2, device, dtype, stored_as)
        exact = self._pool(geometry, 2 * pages + 2, device, torch.float32, None)
        generator = torch.Generator().manual_seed(0)

        def states(tokens: int, heads: int) -> Tensor:
            drawn = torch.randn(tokens, heads, geometry.head_dim, generator=generator)
            return drawn.to(device, dtype)

        self.caches: list[StagedCache] = []
        stock: list[StagedCache] = []
        for caches, pool in ((self.caches, self.pool), (stock, exact)):
            pool._free = random.Random(1).sample(pool._free, len(pool._free))
            for held, new in zip(batch.contexts, batch.counts, strict=True):
                cache = StagedCache(pool, [0], 1)
                cache.reserve([held])
                cache.advance([held])
                cache.reserve([new])
                caches.append(cache)
        for one, other in zip(self.caches, stock, strict=True):
            slots, same = one.stages[0].slots()[0], other.stages[0].slots()[0]
            if len(slots):
                self.pool.write(slots, states(len(slots), geometry.kv_heads), states(len(slots), geometry.kv_heads))
                exact.write(same, *(each.float() for each in self.pool.read(slots)))
        tokens = sum(batch.counts)
        self._states = states(tokens, geometry.heads), *(states(tokens, geometry.kv_heads) for _ in range(2))
        # Stock attention wants decodes first; all scenarios have them first.
        query, key, value = self._states
        new = [self.pool.computed(self.pool.stored(each)).float() for each in (key, value)]
        plan = SdpaBackend(exact).plan(range(1), stock, batch.counts)
        self.expected = plan.attend(0, query.float(), new[0], new[1], scale=self._scale)
        self.tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        self.bytes_read = sum(ends) * self.pool.token_bytes

    @staticmethod
    def _pool(
        geometry: Geometry, pages: int, device: torch.device, dtype: torch.dtype, stored_as: torch.dtype | None
    ) -> PagePool:
        token = 2 * geometry.kv_heads * geometry.head_dim * (stored_as or dtype).itemsize
        pool = PagePool(
            pages * geometry.page_size * token,
            page_size=geometry.page_size,
            heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            dtype=dtype,
            stored_as=stored_as,
            device=device,
        )
        # FlexAttention on the CPU reads what it masks, and NaN times a weight of zero is NaN.
        pool.key_store.zero_()
        pool.value_store.zero_()
        return pool

    def work(self, backend: Backend) -> Callable[[], Tensor]:
        """One layer, planned beforehand."""
        query, key, value = self._states
        if not self._batch.decodes_only:
            plan = backend.plan(range(1), self.caches, self._batch.counts)
            return lambda: plan.attend(0, query, key, value, scale=self._scale)
        own = [cache.stages[0].pages[0].tolist() for cache in self.caches]
        blocks = max(map(len, own))
        device = query.device
        padded = [[*row, *row[-1:] * (blocks - len(row))] for row in own]
        tables = torch.tensor(padded, dtype=torch.int32, device=device)
        lens = torch.tensor([held + 1 for held in self._batch.contexts], dtype=torch.int32, device=device)
        decodes = backend.decodes(len(own), blocks)
        return lambda: decodes(query, key, value, tables, lens, self._scale)


def _captured(work: Callable[[], Tensor]) -> tuple[Callable[[], object], int, bool]:
    """Calls as a CUDA graph, how many they are, and whether they could be captured; else a single one as it is."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_CALLS):
                work()
    except RuntimeError:
        torch.cuda.synchronize()
        return work, 1, False
    return graph.replay, _CALLS, True


def _triton(
    *, tiling: tuple[int, int, int, int] | None = None, splits: int | None = None
) -> Callable[[PagePool, int], Backend]:
    def build(pool: PagePool, heads: int) -> Backend:
        from vflowopt.runtime.ragged_attention import RaggedBackend, Tiling

        chosen = None if tiling is None else Tiling(*tiling)
        return RaggedBackend(pool, heads, chosen=None if chosen is None else (chosen, chosen), splits=splits)

    return build


def _flex(pool: PagePool, heads: int) -> Backend:
    from benchmarks.flex_backend import FlexBackend

    return FlexBackend(pool, heads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    options = _options(arguments)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    geometry = GEOMETRIES[options.geometry]
    if options.page_size:
        geometry = replace(geometry, page_size=options.page_size)
    ways = variants(dtype, geometry, tilings=not options.quick)
    found = list(
        rows(
            device,
            dtype,
            geometry,
            scenarios(options.shorter),
            ways,
            budget_s=options.seconds,
            repeats=options.repeats,
        )
    )
    found.sort(key=lambda row: (str(row["scenario"]), row["ms"] is None, row["ms"] or 0.0))
    print(render(found))
    print(f"\n{geometry}, {options.dtype}; ms: median of {options.repeats}, with the 10th and 90th percentile")
    if options.json:
        write(found, options.json)
    return 0 if any(row["ms"] is not None for row in found) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="attention", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="number type of queries and pages")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b", help="heads of which model")
    parser.add_argument("--page-size", type=int, help="tokens of a page (default: the geometry's)")
    parser.add_argument("--shorter", type=int, default=1, metavar="N", help="divide all lengths by this")
    parser.add_argument("--quick", action="store_true", help="only the default tilings and splits")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each variant")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no further variant after this long")
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
