"""Gradients of a batch computed in shards, one processor core each.

Cores that synchronise once per step wait less for each other, and for other programs, than cores that synchronise in
every operation: on two shared cores training is about half as fast again.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Shard = TypeVar("Shard")


class ShardedGradient(Generic[Shard]):
    """Computes the mean gradient over shards of a batch, each in a thread of its own.

    Args:
        parameters: what to differentiate by; their ``.grad`` is set by every call.
        loss: differentiable loss of one shard.
        shards: how many, each in a thread of its own.
        autocast: run the loss under bfloat16 autocast; at the language model's width float32 is 1.75 times as fast.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], loss: Callable[[Shard], Tensor], shards: int, *, autocast: bool
    ) -> None:
        self.parameters = list(parameters)
        self.shards = shards
        self._loss = loss
        self._autocast = autocast
        self._threads = ThreadPoolExecutor(shards, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, shards: Sequence[Shard]) -> float:
        """Set the parameters' gradients to the mean over ``shards``; returns the mean loss."""
        results = list(self._threads.map(self._differentiate, shards))
        for index, parameter in enumerate(self.parameters):
            total = results[0][1][index]
            for _, gradients in results[1:]:
                total.add_(gradients[index])
            parameter.grad = total.div_(len(results))
        return sum(loss for loss, _ in results) / len(results)

    def _differentiate(self, shard: Shard) -> tuple[float, tuple[Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            loss = self._loss(shard)
        return loss.item(), torch.autograd.grad(loss, self.parameters)
