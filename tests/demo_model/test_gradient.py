import torch
from torch import Tensor, nn

from demo_model.gradient import ShardedGradient


def test_shards_give_the_gradient_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    batch = torch.randn(8, 4)

    def loss(part: Tensor) -> Tensor:
        return linear(part).square().mean()

    expected = torch.autograd.grad(loss(batch), list(linear.parameters()))
    mean = ShardedGradient(list(linear.parameters()), loss, 2, autocast=False)(batch.chunk(2))
    assert abs(mean - loss(batch).item()) < 1e-6
    for parameter, gradient in zip(linear.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
