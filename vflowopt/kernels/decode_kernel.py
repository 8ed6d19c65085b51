"""A compiled kernel for decode attention on the CPU: one new token per sequence attends to all pages of its sequence.

PyTorch's attention needs contiguous keys and values, so the pages of every sequence are gathered first, in every layer
of every step. That takes longer than the attention itself. The kernel reads the pages in place.

It is compiled for the model's geometry when the model is loaded; see :mod:`vflowopt.kernels.build`.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import torch
from torch import Tensor

from vflowopt.kernels import build

log = logging.getLogger(__name__)

_MOST_PAGE = 256  # MAX_PAGE in the source


class DecodeKernel:
    """The kernel for one geometry, float32.

    Args:
        function: the compiled function.
    """

    def __init__(self, function: Any) -> None:
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self._function = function
        self._function.restype = None
        self._function.argtypes = [*[pointer] * 5, *[whole] * 4, ctypes.c_float, pointer]

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, page_size: int, scale: float
    ) -> Tensor:
        """Attention of one token of each sequence.

        Args:
            query: float32 [sequences, kv_heads * group, head_dim].
            keys: float32 [slots, kv_heads, head_dim].
            values: like ``keys``.
            pages: int64 [sequences, blocks], the block tables; pages after the end of a context are not read.
            lengths: int64 [sequences], the tokens of each context.
            page_size: slots of a page, at most 256.
            scale: factor of the scores.

        Returns:
            float32 like ``query``.
        """
        query = query.contiguous()
        output = torch.empty_like(query)
        sequences, num_blocks = pages.shape
        self._function(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            pages.data_ptr(),
            lengths.data_ptr(),
            sequences,
            num_blocks,
            page_size,
            keys.shape[1],
            scale,
            output.data_ptr(),
        )
        return output


def build_decode_kernel(head_dim: int, heads: int, kv_heads: int, page_size: int) -> DecodeKernel | None:
    """Build the kernel; None if that is not possible, and the log says why.

    Args:
        head_dim: channels of a head.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer.
        page_size: tokens of a page.
    """
    if heads % kv_heads or page_size > _MOST_PAGE:
        log.warning(
            "decoding runs without its compiled kernel, which is not made for %d heads on %d and pages of %d tokens",
            *(heads, kv_heads, page_size),
        )
        return None
    function = build.load("paged_decode", "decoding", HEAD_DIM=head_dim, GROUP=heads // kv_heads)
    return None if function is None else DecodeKernel(function)
