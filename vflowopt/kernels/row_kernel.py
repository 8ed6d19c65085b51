"""Compiled kernels for what a decoder layer does to each of a few tokens beside attention, on the CPU.

In PyTorch an RMS norm is a dozen operations, and each takes longer to start than to compute, for one token and few. The
matrix products of MKL are fast for one row, and for many; from 2 to 32 rows these here take half the time. A row's
results do not depend on the rows beside it.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from vflowopt.kernels import build


class RowKernel:
    """The kernels, for float32 rows of any width.

    Args:
        library: the compiled source.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self._norm, self._gated, self._product = library.rms_norm, library.gated_silu, library.product
        self._norm.restype = self._gated.restype = self._product.restype = None
        self._norm.argtypes = [pointer, pointer, whole, whole, ctypes.c_float, pointer]
        self._gated.argtypes = [pointer, whole, whole, pointer]
        self._product.argtypes = [pointer, whole, whole, *[pointer] * 3, whole, pointer]

    def norm(self, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMS norm of states [tokens, width], contiguous like the weight [width]."""
        output = torch.empty_like(states)
        rows, width = states.shape
        self._norm(states.data_ptr(), weight.data_ptr(), rows, width, epsilon, output.data_ptr())
        return output

    def gated(self, states: Tensor) -> Tensor:
        """The SiLU of a gate times what it gates: from [tokens, 2 * width], the gate first, to [tokens, width]."""
        rows, width = len(states), states.shape[1] // 2
        output = torch.empty(rows, width)
        self._gated(states.data_ptr(), rows, width, output.data_ptr())
        return output

    def product(self, states: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None) -> Tensor:
        """Multiply states [tokens, in] by a weight [in, out], and add ``bias`` [out] and ``onto`` [tokens, out]."""
        (rows, width), out = states.shape, weight.shape[1]
        output = torch.empty(rows, out)
        self._product(
            states.data_ptr(),
            rows,
            width,
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if onto is None else onto.data_ptr(),
            out,
            output.data_ptr(),
        )
        return output


@cache
def row_kernel() -> RowKernel | None:
    """The kernels, built on the first call; None if that is not possible, and the log says why."""
    library = build.load("token_rows", "decoding")
    return None if library is None else RowKernel(library)
