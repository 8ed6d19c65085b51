"""Attention backends: what computes attention over the paged cache, and what the decoder needs of it.

- ``"triton"``: kernels of our own that read pages of any size in place; see
  :mod:`vflowopt.runtime.ragged_attention`. The first choice on CUDA.
- ``"varlen"``: PyTorch's variable-length flash attention; see :mod:`vflowopt.runtime.varlen_attention`. The second
  choice on CUDA.
- ``"sdpa"``: PyTorch's scaled dot-product attention, on every device; see :mod:`vflowopt.runtime.attention`. On the CPU
  a compiled kernel computes its decodes.

A further backend, such as one with FlashInfer's kernels, is a class with the methods of :class:`Backend`, and an entry
in :mod:`vflowopt.runtime.backend_choice`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from vflowopt.runtime.cache import StagedCache

BackendName = Literal["triton", "varlen", "sdpa"]


class Plan(Protocol):
    """Where the keys and values of a batch are written and read; each batch has its own."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See :meth:`AttentionPlan.attend`."""
        ...


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
