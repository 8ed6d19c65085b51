"""Matrix products with weights, on the processor by whichever library is faster there: torch's own choice, or oneDNN.

For float32 torch calls MKL, which does not use AVX512 on processors of all makers. oneDNN does: on an AMD EPYC it takes
less than half the time, at every shape where the arithmetic takes longer than the call. Nor do its results depend on
how many rows a product has, which MKL's do for few. A trial decides for each shape, when the weights are loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ENOUGH = 1 << 20
"""Multiplications from which on a call of oneDNN, which takes 10 microseconds more, pays off: at 40 to 100 billion a
second that torch's choice does, these take as long."""

_TRIAL = 4 << 20
"""Multiplications of a product in a trial."""

_CLEARLY = 0.9
"""Of the time that torch's choice takes, what oneDNN may take at most to be chosen. Where the two are alike, the choice
shall not differ from one start to the next, because the results differ in their last bits."""

Activation = Literal["none", "gelu", "gelu_tanh"]
"""What is applied to each value of a product; ``gelu_tanh`` is the approximation by a hyperbolic tangent."""

# A private operator of torch, which its compiler uses for the same purpose; no public one takes float32 to oneDNN.
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

_ONEDNN_NAMES = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def product(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    onto: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """Multiply states by a weight.

    Args:
        states: [..., in].
        weight: [out, in], or the transposed view of an [in, out].
        bias: [out].
        onto: [..., out], added to the result.
        activation: applied to the product, before ``onto`` is added; one of the two at most.

    Returns:
        [..., out].
    """
    if by_onednn(weight) and states.numel() * len(weight) >= ENOUGH:
        if onto is not None:
            summed: Tensor = _onednn.binary(states, onto, weight, bias, "add")
            return summed
        multiplied: Tensor = _onednn(
            states, weight, bias, _ONEDNN_NAMES[activation][0], [], _ONEDNN_NAMES[activation][1]
        )
        return multiplied
    result = F.linear(states, weight, bias)
    if activation != "none":
        result = F.gelu(result, approximate="tanh" if activation == "gelu_tanh" else "none")
    return result if onto is None else result.add_(onto)


def by_onednn(weight: Tensor) -> bool:
    """Whether products with ``weight``, [out, in], are oneDNN's as soon as they are large enough."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return _onednn_is_faster(*weight.shape, weight.stride(-1) == 1, weight.dtype)


@cache
def _onednn_is_faster(out: int, width: int, by_rows: bool, dtype: torch.dtype) -> bool:
    """Try both on a weight of this shape; see :func:`by_onednn`."""
    if _onednn is None or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:  # torch's own choice, too; but by one operation it can do more
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-any-return]
    weight = torch.full((out, width), 0.5) if by_rows else torch.full((width, out), 0.5).t()
    states = torch.full((_rows(out, width), width), 0.5)
    with torch.inference_mode(), _one_thread():
        try:
            theirs = _shortest(lambda: _onednn(states, weight, None, "none", [], ""))
        except RuntimeError:  # another release of torch may have another operator by this name
            return False
        return theirs < _CLEARLY * _shortest(lambda: F.linear(states, weight))


@cache
def bfloat16_is_faster(out: int, width: int) -> bool:
    """Whether products with a weight [out, in] take clearly less time in bfloat16 than in float32.

    So they do where the processor multiplies bfloat16; where it does not, they take longer.
    """
    with torch.inference_mode(), _one_thread():
        weight, states = torch.full((out, width), 0.5), torch.full((_rows(out, width), width), 0.5)
        narrow, narrow_states = weight.bfloat16(), states.bfloat16()
        return _shortest(lambda: product(narrow_states, narrow)) < _CLEARLY * _shortest(lambda: product(states, weight))


def _rows(out: int, width: int) -> int:
    return min(max(_TRIAL // (out * width), 8), 256)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several would wait for each other, and for whatever else keeps the processor busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shortest(work: Callable[[], object]) -> float:
    """Seconds of the quickest of a few runs, after one that does not count."""
    work()
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


class ProductLinear(nn.Linear):
    """A linear map whose products are :func:`product`'s. For inference."""

    def forward(self, states: Tensor) -> Tensor:
        """From [..., in] to [..., out]."""
        if torch.is_grad_enabled() and (states.requires_grad or self.weight.requires_grad):
            return super().forward(states)
        return product(states, self.weight, self.bias)


def speed_up(network: nn.Module) -> None:
    """Let the plain linear maps of ``network`` that lie on the processor multiply by :func:`product`.

    The modules stay what and where they are, with their weights, names and hooks; only the operation changes.
    """
    for module in network.modules():
        if type(module) is nn.Linear and type(module.weight.detach()) is Tensor and module.weight.device.type == "cpu":
            module.__class__ = ProductLinear
