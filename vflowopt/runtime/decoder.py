"""The decoder's layers, run over a flat batch of tokens. There are two implementations with the same results: Hugging
Face's own modules, and a fused pass over the same weights for the architecture that most decoders share.

In a decode step of a small model nearly all time is spent on starting operations, not on arithmetic. The fused pass
starts a third as many: one matrix product gives queries, keys and values, one gives both halves of the feed-forward
network, weights are stored in the order in which the product reads them, and the rotary embedding is one product of
complex numbers.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vflowopt.kernels.row_kernel import RowKernel, row_kernel
from vflowopt.models.product import ENOUGH, by_onednn, product
from vflowopt.runtime.attention import PAGED, AttentionPlan
from vflowopt.runtime.backend import Plan
from vflowopt.runtime.rope import apply_rope

_FUSABLE = (
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer",
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer",
    "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLDecoderLayer",
)
"""Layers made of: RMS norm, attention without norms of its own, residual, RMS norm, gated SiLU network, residual.

By name: serving one of these families does not import the others.
"""

_STATIC_ROTARIES = ("default", "linear", "llama3", "yarn", "dynamic")
"""Rotary embeddings whose angles depend on the position alone; those of "dynamic" do so within the context."""


class Decoder(ABC):
    """The layers of a decoder, and its rotary embedding."""

    @abstractmethod
    def rotary(self, positions: Tensor) -> tuple[Tensor, ...]:
        """What the layers need of the tokens' positions; only :meth:`pick` and :meth:`run` read it.

        Args:
            positions: int64 [tokens] or [axes, tokens], on the host.
        """

    @abstractmethod
    def pick(self, rotary: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
        """The part of :meth:`rotary`'s result for the tokens ``kept``, int64 [tokens that stay]."""

    @abstractmethod
    def run(self, layers: range, hidden: Tensor, rotary: tuple[Tensor, ...], plan: Plan) -> Tensor:
        """Run hidden states [tokens, hidden] through some layers, which write and read the caches of ``plan``."""

    @abstractmethod
    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the norm after the last layer to hidden states [tokens, hidden]."""


def build_decoder(decoder: Any, *, fuse: bool = True) -> Decoder:
    """The fastest decoder that computes what Hugging Face's ``decoder`` computes.

    Args:
        decoder: a decoder of Hugging Face's. If it is fused, its layers lose their weights, so that no weight is in
            memory twice.
        fuse: False: the layers keep their weights, and run as they are.
    """
    return FusedDecoder(decoder) if fuse and FusedDecoder.fits(decoder) else ModuleDecoder(decoder)


class ModuleDecoder(Decoder):
    """Hugging Face's own layers, which look up :func:`vflowopt.runtime.attention.paged_attention` by name."""

    def __init__(self, decoder: Any) -> None:
        decoder.set_attn_implementation(PAGED)
        self._decoder = decoder
        self._axes = _axes(decoder.config)

    def rotary(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines, each [1, tokens, head_dim]."""
        weight: Tensor = self._decoder.embed_tokens.weight
        places = positions.unsqueeze(-2).to(weight.device, non_blocking=True)
        if self._axes and places.dim() == 2:
            # Text stands at the same position on every axis. Not every version of Hugging Face's modules adds the axes.
            places = places.expand(self._axes, -1, -1)
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
    """The same arithmetic in fewer operations. Moves the layers' weights out of ``decoder``."""

    def __init__(self, decoder: Any) -> None:
        self._rotary_embedding = decoder.rotary_emb
        self._freqs = torch.empty(0)
        self._context: int = decoder.config.max_position_embeddings
        self._axes = _axes(decoder.config)
        self._norm = decoder.norm
        self._rows = _Rows(decoder.norm.weight)
        self._layers = []
        for layer in decoder.layers:
            self._layers.append(_FusedLayer(layer, self._rows))
            layer.to("meta")

    @staticmethod
    def fits(decoder: Any) -> bool:
        """Whether every layer can be fused: of a known kind, not quantized, and with a static rotary embedding."""
        config = decoder.config
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            all(f"{type(layer).__module__}.{type(layer).__name__}" in _FUSABLE for layer in decoder.layers)
            # Quantized weights are modules of other types, or tensors of other types.
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
        """The rotation of each pair of channels, complex64 [tokens, 1, head_dim / 2]; see :func:`apply_rope`."""
        furthest = int(positions[-1]) if positions.shape == (1,) else int(positions.max())
        if furthest >= len(self._freqs):
            # Beyond the context, "dynamic" angles change for all positions: the table grows beyond it only if it must.
            self._freqs = self._table(max(furthest + 1, min(max(1024, 2 * furthest), self._context)))
        places = positions.to(self._freqs.device, non_blocking=True)
        if places.dim() == 1:
            return (self._freqs[places],)
        axes = self._axis_of_pairs(len(places))
        return (self._freqs[places[axes].t(), 0, torch.arange(len(axes), device=places.device)][:, None],)

    def _axis_of_pairs(self, axes: int) -> Tensor:
        """The axis of positions that rotates each pair of channels, int64 [head_dim / 2].

        Families assign pairs to axes in different ways. A step along one axis at a time shows which pairs it rotates.
        """
        weight: Tensor = self._norm.weight
        steps = torch.eye(axes, dtype=torch.int64, device=weight.device)[:, None]
        _, sines = self._rotary_embedding(weight[:0].float(), steps)
        return cast(Tensor, sines[0, :, : sines.shape[-1] // 2].abs().argmax(0))

    def _table(self, length: int) -> Tensor:
        weight: Tensor = self._norm.weight
        # In float32, whatever the type of the weights: angles of late positions need its precision.
        places = torch.arange(length, device=weight.device)[None]
        if self._axes:
            places = places.expand(self._axes, -1, -1)
        cosines, sines = self._rotary_embedding(weight[:0].float(), places)
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
        return self._rows.norm(hidden, self._norm.weight, self._norm.variance_epsilon)


class _Rows:
    """What is done to each token between matrix products: by a compiled kernel if it is faster, or by PyTorch.

    Args:
        weight: some weight of the decoder.

    Attributes:
        kernel: the compiled kernel; None: there is none for this device and type.
    """

    def __init__(self, weight: Tensor) -> None:
        compiled = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.kernel: RowKernel | None = row_kernel() if compiled else None

    def norm(self, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMS norm of [tokens, width]."""
        if self.kernel is not None and states.numel() < _ENOUGH_FOR_PYTORCH:
            return self.kernel.norm(states.contiguous(), weight, epsilon)
        return F.rms_norm(states, states.shape[-1:], weight, epsilon)

    def gated(self, states: Tensor) -> Tensor:
        """The SiLU of a gate times what it gates: from [tokens, 2 * width], the gate first, to [tokens, width]."""
        if self.kernel is not None and states.numel() < _ENOUGH_FOR_PYTORCH:
            return self.kernel.gated(states)
        gate, up = states.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


_ENOUGH_FOR_PYTORCH = 1 << 19
"""Values from which on PyTorch's operations, on several threads, are faster than the kernels, which have one."""

_ENOUGH_FOR_THREADS = 8 << 20
"""Multiplications of a product from which on PyTorch's, on several threads, is faster."""


class _FusedLayer:
    """One layer: its weights, each [in, out]."""

    def __init__(self, layer: Any, rows: _Rows) -> None:
        self._rows = rows
        attention, network = layer.self_attn, layer.mlp
        self._size = attention.head_dim
        self._scale = attention.scaling
        rotated = [_interleave(linear, self._size) for linear in (attention.q_proj, attention.k_proj)]
        value = (attention.v_proj.weight, attention.v_proj.bias)
        self._heads = [len(weight) // self._size for weight, _ in (*rotated, value)]
        self._query_key_value = _Product([*rotated, value], rows)
        self._output = _Product([(attention.o_proj.weight, attention.o_proj.bias)], rows)
        self._gate_up = _Product(
            [(linear.weight, linear.bias) for linear in (network.gate_proj, network.up_proj)], rows
        )
        self._down = _Product([(network.down_proj.weight, network.down_proj.bias)], rows)
        self._norms = [
            (norm.weight, norm.variance_epsilon) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]

    def __call__(self, index: int, hidden: Tensor, freqs: Tensor, plan: Plan) -> Tensor:
        tokens = len(hidden)
        (weight, epsilon), (late_weight, late_epsilon) = self._norms
        states = self._query_key_value(self._rows.norm(hidden, weight, epsilon))
        if isinstance(plan, AttentionPlan) and plan.rotates:
            attended = plan.attend_unrotated(index, states, freqs, self._scale)
        else:
            heads = states.view(tokens, -1, self._size)
            queries, keys, _ = self._heads
            rotated = apply_rope(heads[:, : queries + keys], freqs)
            attended = plan.attend(
                index, rotated[:, :queries], rotated[:, queries:], heads[:, queries + keys :], scale=self._scale
            ).reshape(tokens, -1)
        hidden = self._output(attended, onto=hidden)
        normed = self._rows.norm(hidden, late_weight, late_epsilon)
        return self._down(self._rows.gated(self._gate_up(normed)), onto=hidden)


class _Product:
    """Several linear maps of the same input, as one matrix product."""

    def __init__(self, maps: list[tuple[Tensor, Tensor | None]], rows: _Rows) -> None:
        self._weight = torch.cat([weight.detach() for weight, _ in maps]).t().contiguous()
        biases = [weight.new_zeros(len(weight)) if bias is None else bias.detach() for weight, bias in maps]
        self._bias = None if all(bias is None for _, bias in maps) else torch.cat(biases)
        self._kernel = rows.kernel
        self._few = _ENOUGH_FOR_THREADS // self._weight.numel()
        # Of one token and few, torch multiplies fastest by a weight that lies as this one does.
        self._tokens_for_onednn = ENOUGH // self._weight.numel() if by_onednn(self._weight.t()) else sys.maxsize

    def __call__(self, states: Tensor, onto: Tensor | None = None) -> Tensor:
        """From [tokens, in] to [tokens, out], added to ``onto`` if it is given."""
        if self._kernel is not None and len(states) <= self._few:
            return self._kernel.product(states, self._weight, self._bias, onto)
        if len(states) > self._tokens_for_onednn:
            return product(states, self._weight.t(), self._bias, onto=onto)
        if onto is None:
            return states @ self._weight if self._bias is None else torch.addmm(self._bias, states, self._weight)
        result = torch.addmm(onto, states, self._weight)
        return result if self._bias is None else result.add_(self._bias)


def _axes(config: Any) -> int:
    """How many axes positions have for Hugging Face's rotary embedding (M-RoPE); 0: they are plain numbers."""
    rope = getattr(config, "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or ())


def _projections(network: Any) -> tuple[Any, ...]:
    return network.gate_proj, network.up_proj, network.down_proj


def _interleave(linear: Any, size: int) -> tuple[Tensor, Tensor | None]:
    """Reorder the channels of each head so that the two that the rotary embedding rotates together are adjacent.

    Queries and keys are reordered alike, so their products do not change.
    """

    def reorder(rows: Tensor) -> Tensor:
        heads = rows.view(-1, 2, size // 2, *rows.shape[1:])
        return heads.transpose(1, 2).reshape(rows.shape)

    return reorder(linear.weight), None if linear.bias is None else reorder(linear.bias)
