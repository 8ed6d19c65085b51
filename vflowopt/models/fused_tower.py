"""The layers of a SigLIP or CLIP tower in fewer operations, on the processor: the same arithmetic as Hugging Face's.

One product gives queries, keys and values. The activation and the residual additions are part of the products before
them. Pixels are multiplied as they come: rescaling and normalising them is part of the first weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vflowopt.models.product import Activation, product

_LAYERS = (
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer",
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer",
)
"""Layers made of: norm, attention, residual, norm, two maps with an activation between them, residual. By name: serving
one of these families does not import the other."""

_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


_GREY = 128
"""What is subtracted from 8-bit pixels, so that sums over them are as small as over normalised ones, and as exact."""


class FusedTowerLayer:
    """One layer.

    Its products read the weights of Hugging Face's module where they are; those of queries, keys and values are moved
    to lie one behind the other, and remain the module's.

    Args:
        layer: Hugging Face's; see :meth:`fits`.
    """

    def __init__(self, layer: Any) -> None:
        attention, network = layer.self_attn, layer.mlp
        self._heads: int = attention.num_heads
        self._scale: float = attention.scale
        self._norms = (layer.layer_norm1, layer.layer_norm2)
        self._weight, self._bias = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self._output, self._up, self._down = attention.out_proj, network.fc1, network.fc2
        kind = getattr(attention.config, "hidden_act", None)
        self._fused_activation = _ACTIVATIONS.get(str(kind))
        self._activation = network.activation_fn

    @staticmethod
    def fits(layer: Any) -> bool:
        """Whether a layer is of a known kind, on the processor, and not quantized."""
        if f"{type(layer).__module__}.{type(layer).__name__}" not in _LAYERS:
            return False
        attention, network = layer.self_attn, layer.mlp
        maps = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, network.fc1, network.fc2]
        return all(
            isinstance(each, nn.Linear) and type(each.weight.detach()) is Tensor and each.weight.device.type == "cpu"
            for each in maps
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """From [tiles, tokens, channels] to the same."""
        states = product(self._normed(0, hidden), self._weight, self._bias)
        query, key, value = states.unflatten(-1, (3, self._heads, -1)).movedim(-2, 1).unbind(-2)
        attended = _attention(query, key, value, self._scale).transpose(1, 2).flatten(2)
        hidden = product(attended, self._output.weight, self._output.bias, onto=hidden)
        normed = self._normed(1, hidden)
        if self._fused_activation is None:
            inner = self._activation(product(normed, self._up.weight, self._up.bias))
        else:
            inner = product(normed, self._up.weight, self._up.bias, activation=self._fused_activation)
        return product(inner, self._down.weight, self._down.bias, onto=hidden)

    def queries_and_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of the layer's input [tiles, tokens, channels], each [tiles, heads, tokens, head_dim]."""
        channels = len(self._weight) // 3 * 2
        states = product(self._normed(0, hidden), self._weight[:channels], self._bias[:channels])
        query, key = states.unflatten(-1, (2, self._heads, -1)).movedim(-2, 1).unbind(-2)
        return query, key

    def _normed(self, which: int, hidden: Tensor) -> Tensor:
        norm = self._norms[which]
        return F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class PatchProduct:
    """The patch embedding of 8-bit pixels, as one product; rescaling and normalising are part of its weight.

    Args:
        convolution: the patch embedding of normalised pixels, with a stride as long as its kernel.
        rescale: factor of the pixels in normalisation.
        mean: of each colour, subtracted thereafter.
        deviation: of each colour, by which is divided thereafter.
    """

    def __init__(
        self, convolution: nn.Conv2d, rescale: float, mean: Sequence[float], deviation: Sequence[float]
    ) -> None:
        weight = convolution.weight.detach()
        self._side: int = weight.shape[-1]
        self._dtype = weight.dtype
        by_colour = torch.tensor([mean, deviation], dtype=torch.float64)[..., None, None]
        exact = weight.double() / by_colour[1]
        # In float32, whatever the type of the tower: here it costs little, and every pixel passes through it.
        self._weight = (exact * rescale).flatten(1).float()
        offset = (exact * (_GREY * rescale - by_colour[0])).sum((1, 2, 3))
        self._bias = (offset if convolution.bias is None else offset + convolution.bias.detach()).float()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Embed uint8 [tiles, 3, height, width]; what lies beyond the last whole patch is left out.

        Returns:
            [tiles, patches, channels].
        """
        tiles, colours, *size = pixels.shape
        side = self._side
        rows, columns = (length // side for length in size)
        squares = pixels[..., : rows * side, : columns * side].view(tiles, colours, rows, side, columns, side)
        patches = torch.empty(tiles, rows, columns, colours, side, side)
        patches.copy_(squares.permute(0, 2, 4, 1, 3, 5)).sub_(_GREY)
        return product(patches.view(tiles, rows * columns, -1), self._weight, self._bias).to(self._dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Each [tiles, heads, tokens, head_dim], as is the result."""
    if query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    # By two products it takes half as long as by torch's fused attention; a tile at a time, for the memory of weights.
    attended = [
        torch.bmm(torch.bmm(queries * scale, keys.transpose(1, 2)).softmax(-1), values)
        for queries, keys, values in zip(query, key, value, strict=True)
    ]
    return torch.stack(attended)


def _joined(maps: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    """The weights and biases of maps of one input, one behind the other. Those of the maps become views of them."""
    weight = torch.cat([each.weight.detach() for each in maps])
    bias = torch.cat([each.bias.detach() for each in maps])
    for each, of_map, of_bias in zip(maps, weight.chunk(len(maps)), bias.chunk(len(maps)), strict=True):
        each.weight.data, each.bias.data = of_map, of_bias
    return weight, bias
