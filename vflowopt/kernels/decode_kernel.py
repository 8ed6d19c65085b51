"""A compiled kernel for decode attention on the CPU: one new token per sequence attends to all pages of its sequence.

PyTorch's attention needs contiguous keys and values, so the pages of every sequence are gathered first, in every layer
of every step. That takes longer than the attention itself. The kernel reads the pages in place, and rotates and writes
the new keys and values on the way.

It is compiled for the model's geometry when the model is loaded; see :mod:`vflowopt.kernels.build`.
"""

from __future__ import annotations

import ctypes
import logging
import math

import torch
from torch import Tensor

from vflowopt.kernels import build

log = logging.getLogger(__name__)

_MOST_PAGE, _MOST_LANES = 256, 16


class DecodeKernel:
    """The kernel for one geometry, float32.

    Args:
        library: the compiled source.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer.
        head_dim: channels of a head.
        page_size: tokens of a page.

    Attributes:
        page_size: as given.
    """

    def __init__(self, library: ctypes.CDLL, heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
        self.page_size = page_size
        self._width, self._kv_heads = heads * head_dim, kv_heads
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self._function = library.paged_decode
        self._function.restype = None
        self._function.argtypes = [*[pointer] * 6, *[whole] * 3, ctypes.c_float, pointer]

    def __call__(
        self,
        states: Tensor,
        freqs: Tensor | None,
        keys: Tensor,
        values: Tensor,
        pages: Tensor,
        lengths: Tensor,
        scale: float,
    ) -> Tensor:
        """Write the key and value of one new token of each sequence, and attend from it to its sequence's context.

        Args:
            states: float32 [tokens, (heads + 2 * kv_heads) * head_dim], the queries, keys and values of the new tokens,
                contiguous; the first ones are those of the sequences.
            freqs: complex64 [tokens, 1, head_dim / 2], the rotation of each pair of adjacent channels of queries and
                keys; None: they are rotated already.
            keys: float32 [slots, kv_heads, head_dim].
            values: like ``keys``.
            pages: int64 [sequences, blocks], the block tables; pages after the end of a context are not read.
            lengths: int64 [sequences], the tokens of each context, the new ones included.
            scale: factor of the scores.

        Returns:
            float32 [tokens, heads * head_dim]; what belongs to other tokens than those of the sequences is undefined.
        """
        output = torch.empty(len(states), self._width)
        sequences, num_blocks = pages.shape
        self._function(
            states.data_ptr(),
            None if freqs is None else freqs.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            pages.data_ptr(),
            lengths.data_ptr(),
            sequences,
            num_blocks,
            self._kv_heads,
            scale,
            output.data_ptr(),
        )
        return output


def build_decode_kernel(head_dim: int, heads: int, kv_heads: int, page_size: int) -> DecodeKernel | None:
    """Build the kernel; None if that is not possible, and the log says why.

    Args:
        head_dim: channels of a head, an even number.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer.
        page_size: tokens of a page.
    """
    if heads % kv_heads or head_dim % 2 or page_size > _MOST_PAGE:
        log.warning(
            "decoding runs without its compiled kernel, which is not made for %d heads of %d channels on %d heads and "
            "pages of %d tokens",
            *(heads, head_dim, kv_heads, page_size),
        )
        return None
    lanes = math.gcd(head_dim, _MOST_LANES)
    library = build.load(
        "paged_decode", "decoding", HEAD_DIM=head_dim, GROUP=heads // kv_heads, PAGE=page_size, LANES=lanes
    )
    return None if library is None else DecodeKernel(library, heads, kv_heads, head_dim, page_size)
