"""Decode steps on a CUDA device as one launch: CUDA graphs over fixed batch sizes.

A decode step of a small batch is hundreds of short kernels. The host takes longer to start them than the device takes
to run them. A CUDA graph starts them all at once, but it has one shape, and reads and writes only the addresses that it
was captured with. So there is a graph for each of a few batch sizes and capacities, each with buffers of its own, and a
batch runs in the smallest graph that it fits into.

A graph has a block table and a context length for each *layer* and sequence, and not for each stage, so that sequences
of any strategies share it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vflowopt.runtime.backend import Backend
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.transfer import to_device

SIZES = (1, 2, 4, 8, 16, 32)
"""Batch sizes of the graphs."""

_MOST_COPIED = 8
"""How many pages a graph may copy for each page of the batch, if its kernel cannot read pages in place."""

Rotary = tuple[Tensor, ...]
"""What the layers need of the tokens' positions."""


class DecodePlan:
    """Where one new token of each of a fixed number of sequences is written, and what it attends to.

    Like :class:`vflowopt.runtime.attention.AttentionPlan`, but for all layers, and with buffers that keep their
    addresses from step to step.

    Args:
        pool: the caches' pages.
        layers: number of decoder layers.
        batch: number of sequences.
        blocks: the most blocks of a sequence, its new token included.
        backend: computes attention.

    Attributes:
        pages: int32 [layers, batch, blocks], the block tables.
        context_lens: int32 [layers, batch], the tokens of each context, the new one included.
    """

    def __init__(self, pool: PagePool, layers: int, batch: int, blocks: int, backend: Backend) -> None:
        device = pool.keys.device
        self._attention = backend.decodes(batch, blocks)
        self.pages = torch.zeros(layers, batch, blocks, dtype=torch.int32, device=device)
        self.context_lens = torch.ones(layers, batch, dtype=torch.int32, device=device)
        self._laid_out = np.zeros((layers, batch, blocks), np.int32)
        self._made_of: list[list[np.ndarray]] = [[] for _ in range(batch)]

    def fill(self, caches: Sequence[StagedCache]) -> None:
        """Set pages and lengths from ``caches``, one for each row, each with pages reserved for one more token."""
        context_lens = np.empty(self.context_lens.shape, np.int32)
        changed = False
        for row, cache in enumerate(caches):
            for stage in cache.stages:
                context_lens[stage.layers.start : stage.layers.stop, row] = stage.length + 1
            # A table replaces its array whenever its blocks change, and never writes to it. So a row made from the
            # same arrays is up to date.
            arrays = [stage.pages for stage in cache.stages]
            if [*map(id, arrays)] != [*map(id, self._made_of[row])]:
                self._lay_out(row, cache)
                self._made_of[row] = arrays
                changed = True
        self.context_lens.copy_(to_device(context_lens, self.context_lens.device), non_blocking=True)
        if changed:
            self.pages.copy_(to_device(self._laid_out, self.pages.device), non_blocking=True)

    def _lay_out(self, row: int, cache: StagedCache) -> None:
        for stage in cache.stages:
            own = stage.pages[:, : self._laid_out.shape[2]]
            pages = self._laid_out[stage.layers.start : stage.layers.stop, row]
            pages[:, : own.shape[1]] = own
            # A sequence is padded with its own last page: no numbers of another reach it, masked or not.
            pages[:, own.shape[1] :] = own[:, -1:]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Write new keys and values to a layer, then attend from each sequence's new token to its context.

        Args:
            layer: the decoder layer.
            query: [batch, heads, head_dim].
            key: [batch, kv_heads, head_dim]; written into the caches, like ``value``.
            value: [batch, kv_heads, head_dim].
            scale: factor of the scores.

        Returns:
            [batch, heads, head_dim].
        """
        return self._attention(query, key, value, self.pages[layer], self.context_lens[layer], scale)


Step = Callable[[Tensor, Rotary, DecodePlan], Tensor]
"""From token ids int32 [batch], what the layers need of their positions, and the plan, to logits [batch, vocabulary].

It must run the same operations on the same shapes each time, and must not wait for the device.
"""


class DecodeGraph:
    """A decode step of a fixed number of sequences with a fixed capacity, captured when it first runs.

    Without a CUDA device, or if the step cannot be captured, the step runs without a graph.

    Args:
        plan: where it writes and reads.
        rotary: an example of what the layers need of the positions.
        step: the decode step.
        memory: a ``torch.cuda.graph_pool_handle()``: graphs that never run at the same time share it.
    """

    def __init__(self, plan: DecodePlan, rotary: Rotary, step: Step, memory: Any) -> None:
        self._plan = plan
        self._tokens = torch.zeros(plan.context_lens.shape[1], dtype=torch.int32, device=plan.context_lens.device)
        self._rotary = tuple(torch.empty_like(part) for part in rotary)
        self._step = step
        self._memory = memory
        self._capturable = plan.context_lens.is_cuda
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor

    def run(self, caches: Sequence[StagedCache], tokens: Sequence[int], rotary: Rotary) -> Tensor:
        """Run one token of each sequence; logits [batch, vocabulary], which the next run of any graph overwrites."""
        self._plan.fill(caches)
        self._tokens.copy_(to_device(np.array(tokens, np.int32), self._tokens.device), non_blocking=True)
        for buffer, part in zip(self._rotary, rotary, strict=True):
            buffer.copy_(part, non_blocking=True)
        if self._graph is None and self._capturable:
            self._capture()
        if self._graph is None:
            self._logits = self._step(self._tokens, self._rotary, self._plan)
        else:
            self._graph.replay()
        return self._logits

    def _capture(self) -> None:
        """Run the step, so that everything it allocates once exists, and then capture it.

        It may run any number of times: it writes the same numbers to the same slots.
        """
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._step(self._tokens, self._rotary, self._plan)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may be encoding a picture on a stream of its own, and may go on.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._logits = self._step(self._tokens, self._rotary, self._plan)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failure:
            self._capturable = False
            warnings.warn(f"decode steps cannot be captured and run without CUDA graphs: {failure}", stacklevel=2)
        else:
            self._graph = graph


class DecodeGraphs:
    """Runs decode steps of any sequences, with graphs that are made when they are first needed.

    Args:
        pool: the caches' pages.
        layers: number of decoder layers.
        rotary: from positions, int64 [tokens] on the host (pinned if there is a CUDA device), to what the layers need
            of them: tensors whose shapes depend on the number of tokens alone.
        step: the decode step.
        backend: computes attention.
    """

    def __init__(
        self,
        pool: PagePool,
        layers: int,
        *,
        rotary: Callable[[Tensor], Rotary],
        step: Step,
        backend: Backend,
    ) -> None:
        self._pool = pool
        self._layers = layers
        self._rotary = rotary
        self._step = step
        self._backend = backend
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if pool.keys.is_cuda else None

    def suit(self, caches: Sequence[StagedCache]) -> bool:
        """Whether there is a graph for this many sequences that would not copy far more pages than they have.

        A graph has the same capacity for every sequence. A short sequence beside a very long one is better run without.
        """
        if len(caches) > SIZES[-1]:
            return False
        size, capacity = self._shape(caches)
        pages = sum(stage.pages_for(stage.length + 1) for cache in caches for stage in cache.stages)
        return self._backend.in_place or size * capacity * self._layers <= _MOST_COPIED * pages

    @torch.inference_mode()
    def run(self, caches: Sequence[StagedCache], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Run one token of each sequence, and write it to pages that are reserved; the lengths do not change.

        Rows that are left over repeat the shortest sequence. They write the same numbers to the same slots, so they
        need no pages of their own.

        Args:
            caches: the sequences, all different; :meth:`suit` says whether there is a graph for them.
            tokens: the token of each.
            positions: its position.

        Returns:
            float32 logits [sequences, vocabulary].
        """
        size, capacity = self._shape(caches)
        least = min(range(len(caches)), key=lambda index: sum(caches[index].lengths))
        rows = [*range(len(caches)), *[least] * (size - len(caches))]
        rotary = self._rotary(torch.tensor([positions[row] for row in rows], pin_memory=self._pool.keys.is_cuda))
        graph = self._graphs.get((size, capacity))
        if graph is None:
            plan = DecodePlan(self._pool, self._layers, size, capacity, self._backend)
            graph = self._graphs[size, capacity] = DecodeGraph(plan, rotary, self._step, self._memory)
        logits = graph.run([caches[row] for row in rows], [tokens[row] for row in rows], rotary)
        return logits[: len(caches)].clone()

    def _shape(self, caches: Sequence[StagedCache]) -> tuple[int, int]:
        """Batch size and blocks per sequence of the smallest graph for ``caches`` with one more token each."""
        size = next(size for size in SIZES if size >= len(caches))
        blocks = max(stage.blocks_for(stage.length + 1) for cache in caches for stage in cache.stages)
        return size, 1 << (blocks - 1).bit_length()
