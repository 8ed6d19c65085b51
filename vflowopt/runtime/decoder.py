"""The decoder's layers, run over a flat batch of tokens. Two ways to the same numbers: Hugging Face's own modules, and
a fused pass over the same weights for the architectures that most decoders share.

In a decode step of a small model nearly all time goes into starting operations, not into arithmetic. The fused pass
starts a third as many: queries, keys and values come of one product, so do the two halves of the feed-forward network;
weights lie as the product reads them; the rotary embedding is one product of complex numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vflowopt.runtime.attention import PAGED, Plan

_FUSABLE = (
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer",
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer",
    "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLDecoderLayer",
)
"""Layers that are: RMS norm, attention without norms of its own, residual, RMS norm, gated SiLU network, residual.

By name: whoever serves one of these families need not import the others.
"""

_STATIC_ROTARIES = ("default", "linear", "llama3", "yarn", "dynamic")
"""Rotary embeddings whose angles depend on nothing but the position; "dynamic" ones do so within the context."""


class Decoder(ABC):
    """The layers of a decoder, and what the tokens' positions mean to them."""

    @abstractmethod
    def rotary(self, positions: Tensor) -> tuple[Tensor, ...]:
        """What the layers need of the tokens' positions, int64 [tokens] or [axes, tokens] on the host.

        Every tensor has the tokens in its second dimension, or in its first if it has but one row per token.
        """

    @abstractmethod
    def pick(self, rotary: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
        """The rows of :meth:`rotary` of the tokens ``kept``, int64 [tokens that stay]."""

    @abstractmethod
    def run(self, layers: range, hidden: Tensor, rotary: tuple[Tensor, ...], plan: Plan) -> Tensor:
        """Hidden states [tokens, hidden] through a run of layers, writing and reading the caches of ``plan``."""

    @abstractmethod
    def norm(self, hidden: Tensor) -> Tensor:
        """The norm after the last layer, [tokens, hidden]."""


def build_decoder(decoder: Any, *, fuse: bool = True) -> Decoder:
    """The fastest decoder that computes what Hugging Face's ``decoder`` computes.

    Where it is fused, the weights of its layers move there: the layers themselves are left without any, so that no
    weight is held twice. With ``fuse`` False they stay where they are.
    """
    return FusedDecoder(decoder) if fuse and FusedDecoder.fits(decoder) else ModuleDecoder(decoder)


class ModuleDecoder(Decoder):
    """Hugging Face's own layers; they look up the attention of this package by its name."""

    def __init__(self, decoder: Any) -> None:
        decoder.set_attn_implementation(PAGED)
        self._decoder = decoder

    def rotary(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines, each [1, tokens, head_dim]."""
        weight: Tensor = self._decoder.embed_tokens.weight
        places = positions.unsqueeze(-2).to(weight.device, non_blocking=True)
        cosines, sines = self._decoder.rotary_emb(weight[:0], places)
        return cosines, sines

    def pick(self, rotary: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Decoder.pick`."""
        return tuple(part[:, kept] for part in rotary)

    def run(self, layers: range, hidden: Tensor, rotary: tuple[Tensor, ...], plan: Plan) -> Tensor:
        """See :meth:`Decoder.run`."""
        states = hidden[None]
        for layer in layers:
            output = self._decoder.layers[layer](states, position_embeddings=rotary, plan=plan)
            states = output[0] if isinstance(output, tuple) else output  # some families return a tuple
        return states[0]

    def norm(self, hidden: Tensor) -> Tensor:
        """See :meth:`Decoder.norm`."""
        return cast(Tensor, self._decoder.norm(hidden))


class FusedDecoder(Decoder):
    """The same arithmetic in fewer operations. Takes the layers' weights out of ``decoder``."""

    def __init__(self, decoder: Any) -> None:
        self._rotary_embedding = decoder.rotary_emb
        self._freqs = torch.empty(0)
        self._context: int = decoder.config.max_position_embeddings
        self._norm = decoder.norm
        self._layers = []
        for layer in decoder.layers:
            self._layers.append(_FusedLayer(layer))
            layer.to("meta")

    @staticmethod
    def fits(decoder: Any) -> bool:
        """Whether every layer is of a kind that can be fused, plain, and turned by angles that are static."""
        config = decoder.config
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            all(f"{type(layer).__module__}.{type(layer).__name__}" in _FUSABLE for layer in decoder.layers)
            # Quantized weights come as modules of other types, or as tensors of other types.
            and all(
                type(module) is nn.Linear and type(module.weight.detach()) is Tensor
                for layer in decoder.layers
                for module in (*layer.self_attn.children(), *_projections(layer.mlp))
            )
            and config.hidden_act == "silu"
            and rope.get("rope_type", "default") in _STATIC_ROTARIES
            and float(rope.get("partial_rotary_factor", 1.0)) == 1.0
        )

    def rotary(self, positions: Tensor) -> tuple[Tensor, ...]:
        """A complex number of each token and pair of channels, [tokens, 1, head_dim / 2]: how far the pair turns."""
        furthest = int(positions[-1]) if positions.shape == (1,) else int(positions.max())
        if furthest >= len(self._freqs):
            # Beyond the context "dynamic" angles change for all positions: no table is longer unless it has to be.
            self._freqs = self._table(max(furthest + 1, min(max(1024, 2 * furthest), self._context)))
        places = positions.to(self._freqs.device, non_blocking=True)
        if places.dim() == 1:
            return (self._freqs[places],)
        axes = self._axis_of_pairs(len(places))
        return (self._freqs[places[axes].t(), 0, torch.arange(len(axes), device=places.device)][:, None],)

    def _axis_of_pairs(self, axes: int) -> Tensor:
        """Along which axis of positions each pair of channels turns, int64 [head_dim / 2].

        Families share the pairs out to the axes in their own ways; a step along one axis at a time tells.
        """
        weight: Tensor = self._norm.weight
        steps = torch.eye(axes, dtype=torch.int64, device=weight.device)[:, None]
        _, sines = self._rotary_embedding(weight[:0].float(), steps)
        return cast(Tensor, sines[0, :, : sines.shape[-1] // 2].abs().argmax(0))

    def _table(self, length: int) -> Tensor:
        weight: Tensor = self._norm.weight
        # In float32 whatever the weights are: angles of late positions need its precision.
        cosines, sines = self._rotary_embedding(weight[:0].float(), torch.arange(length, device=weight.device)[None])
        half = cosines.shape[-1] // 2
        return torch.complex(cosines[0, :, None, :half], sines[0, :, None, :half])

    def pick(self, rotary: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Decoder.pick`."""
        return (rotary[0][kept],)

    def run(self, layers: range, hidden: Tensor, rotary: tuple[Tensor, ...], plan: Plan) -> Tensor:
        """See :meth:`Decoder.run`."""
        for layer in layers:
            hidden = self._layers[layer](layer, hidden, rotary[0], plan)
        return hidden

    def norm(self, hidden: Tensor) -> Tensor:
        """See :meth:`Decoder.norm`."""
        return F.rms_norm(hidden, hidden.shape[-1:], self._norm.weight, self._norm.variance_epsilon)


class _FusedLayer:
    """One layer: its weights, each [in, out]."""

    def __init__(self, layer: Any) -> None:
        attention, network = layer.self_attn, layer.mlp
        self._size = attention.head_dim
        self._scale = attention.scaling
        rotated = [_interleave(linear, self._size) for linear in (attention.q_proj, attention.k_proj)]
        value = (attention.v_proj.weight, attention.v_proj.bias)
        self._heads = [len(weight) // self._size for weight, _ in (*rotated, value)]
        self._query_key_value = _Product([*rotated, value])
        self._output = _Product([(attention.o_proj.weight, attention.o_proj.bias)])
        self._gate_up = _Product([(linear.weight, linear.bias) for linear in (network.gate_proj, network.up_proj)])
        self._down = _Product([(network.down_proj.weight, network.down_proj.bias)])
        self._norms = [
            (norm.weight, norm.variance_epsilon) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]

    def __call__(self, index: int, hidden: Tensor, freqs: Tensor, plan: Plan) -> Tensor:
        tokens = len(hidden)
        (weight, epsilon), (late_weight, late_epsilon) = self._norms
        normed = F.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)
        states = self._query_key_value(normed).view(tokens, -1, self._size)
        queries, keys, _ = self._heads
        rotated = apply_rope(states[:, : queries + keys], freqs)
        attended = plan.attend(
            index, rotated[:, :queries], rotated[:, queries:], states[:, queries + keys :], scale=self._scale
        )
        hidden = self._output(attended.reshape(tokens, -1), onto=hidden)
        normed = F.rms_norm(hidden, hidden.shape[-1:], late_weight, late_epsilon)
        gate, up = self._gate_up(normed).chunk(2, dim=-1)
        return self._down(F.silu(gate).mul_(up), onto=hidden)


class _Product:
    """A linear map, of several that read the same input."""

    def __init__(self, maps: list[tuple[Tensor, Tensor | None]]) -> None:
        self._weight = torch.cat([weight.detach() for weight, _ in maps]).t().contiguous()
        biases = [weight.new_zeros(len(weight)) if bias is None else bias.detach() for weight, bias in maps]
        self._bias = None if all(bias is None for _, bias in maps) else torch.cat(biases)

    def __call__(self, states: Tensor, onto: Tensor | None = None) -> Tensor:
        """[tokens, in] to [tokens, out], added to ``onto`` if that is given."""
        if onto is None:
            return states @ self._weight if self._bias is None else torch.addmm(self._bias, states, self._weight)
        result = torch.addmm(onto, states, self._weight)
        return result if self._bias is None else result.add_(self._bias)


def _projections(network: Any) -> tuple[Any, ...]:
    return network.gate_proj, network.up_proj, network.down_proj


def _interleave(linear: Any, size: int) -> tuple[Tensor, Tensor | None]:
    """The two halves of each head, which the rotary embedding turns against each other, laid out channel by channel.

    Queries and keys are reordered alike, so their products stay what they are.
    """

    def reorder(rows: Tensor) -> Tensor:
        heads = rows.view(-1, 2, size // 2, *rows.shape[1:])
        return heads.transpose(1, 2).reshape(rows.shape)

    return reorder(linear.weight), None if linear.bias is None else reorder(linear.bias)


def apply_rope(states: Tensor, freqs: Tensor) -> Tensor:
    """Rotary embedding of states [tokens, heads, head_dim] whose channels lie in pairs."""
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(-2).to(states.dtype)
