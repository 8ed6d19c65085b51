"""The compiled kernels for few tokens compute what PyTorch computes, and for a token the same in any batch."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from vflowopt.kernels.row_kernel import RowKernel, row_kernel

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def kernel() -> RowKernel:
    built = row_kernel()
    assert built is not None
    return built


@pytest.mark.parametrize("width", [1, 16, 192, 300])
def test_norms_and_gates_are_those_of_pytorch(kernel: RowKernel, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    states, weight = torch.randn(5, 2 * width, generator=generator), torch.randn(2 * width, generator=generator)
    states[0] *= 1e-4
    expected = F.rms_norm(states, weight.shape, weight, 1e-6)
    torch.testing.assert_close(kernel.norm(states, weight, 1e-6), expected)
    states *= 40  # a gate may be far from zero, on both sides
    gate, up = states.chunk(2, dim=-1)
    torch.testing.assert_close(kernel.gated(states), F.silu(gate) * up)


@pytest.mark.parametrize("out", [1, 20, 64, 130, 320])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 13, 32])
def test_products_are_those_of_pytorch_and_of_each_row_alone(kernel: RowKernel, rows: int, out: int) -> None:
    generator = torch.Generator().manual_seed(rows * out)
    states, weight = torch.randn(rows, 50, generator=generator), torch.randn(50, out, generator=generator)
    for bias in (None, torch.randn(out, generator=generator)):
        for onto in (None, torch.randn(rows, out, generator=generator)):
            expected = states @ weight
            expected += 0 if bias is None else bias
            expected += 0 if onto is None else onto
            found = kernel.product(states, weight, bias, onto)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
            for row in range(rows):
                own = slice(row, row + 1)
                alone = kernel.product(states[own].clone(), weight, bias, None if onto is None else onto[own].clone())
                assert torch.equal(alone, found[own])  # bit for bit
