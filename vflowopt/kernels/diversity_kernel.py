"""A compiled kernel for the order of maximal marginal relevance on the CPU.

The order is made of thousands of small steps, each of which depends on the last. In PyTorch a step's operations take
longer to start than to compute.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from vflowopt.kernels import build

_LANES = 16  # LANES in the source

_KNOWN, _ENTRY = 5, 2
"""Numbers of 4 bytes of ``struct known`` and ``struct entry`` in the source."""

_WORK = 1 << 28
"""Multiplications of a piece, about 20 milliseconds."""


class DiversityKernel:
    """The kernel, for rows of any width. It runs in the caller's thread, and holds no lock of the interpreter.

    Args:
        library: the compiled source.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.diversity_order
        pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._function.restype = whole
        self._function.argtypes = [*[pointer] * 2, whole, whole, real, *[whole] * 3, *[pointer] * 4]

    def order(
        self, directions: Tensor, relevance: Tensor, first: int, count: int, weight: float, work: int = _WORK
    ) -> Generator[None, None, list[int]]:
        """The first tokens in order, in pieces.

        After ``first`` comes, again and again, the token with the greatest ``relevance - weight * likeness``, where
        likeness is the greatest product with a token that came before; of equal ones the first.

        Args:
            directions: float32 [N, dim], each of length 1, or 0.
            relevance: float32 [N].
            first: the token that comes first.
            count: how many tokens to order, from 1 to N.
            weight: of the likeness.
            work: multiplications of a piece.

        Returns:
            ``count`` tokens.
        """
        tokens, width = directions.shape
        directions = F.pad(directions, (0, -width % _LANES)) if width % _LANES else directions.contiguous()
        relevance, width = relevance.contiguous(), directions.shape[1]
        order = torch.full((count,), first)
        chosen = torch.empty(count, width)
        known, heap = torch.empty(tokens, _KNOWN), torch.empty(tokens, _ENTRY)
        memory = [each.data_ptr() for each in (known, heap, chosen, order)]
        rows, worth, picked = directions.data_ptr(), relevance.data_ptr(), 0
        while True:
            picked = self._function(rows, worth, tokens, width, weight, count, picked, work, *memory)
            if picked == count:
                ordered: list[int] = order.tolist()
                return ordered
            yield


@cache
def diversity_kernel() -> DiversityKernel | None:
    """The kernel, built on the first call; None if that is not possible, and the log says why."""
    library = build.load("diversity_order", "the choice of diverse tokens")
    return None if library is None else DiversityKernel(library)
