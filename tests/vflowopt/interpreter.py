"""Triton's interpreter, which runs kernels on the CPU; ``tests/conftest.py`` turns it on where there is no GPU.

It is repaired in two places, where it does not do what a device does: products of bfloat16 matrices are products of
their bit patterns, and float32 is cut off instead of rounded to bfloat16.
"""

from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests of kernels run: interpreted on the CPU."""


@pytest.fixture(autouse=DEVICE == "cpu")
def repaired_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import this fixture into a module of tests to have its kernels interpreted rightly."""
    builder = interpreter.InterpreterBuilder
    create_dot, cast = builder.create_dot, builder.cast_impl

    def widened(handle: Any) -> Any:
        return cast(None, handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def rounded(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        bits = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return interpreter.TensorHandle(bits, dtype.scalar)

    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "cast_impl", rounded)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(builder, name, rounded)
