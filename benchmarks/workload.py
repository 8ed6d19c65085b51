"""How much arithmetic and memory traffic the steps of a LLaVA-OneVision or a Qwen3-VL need, from its shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlavaOnevisionConfig, Qwen3VLConfig

Config = LlavaOnevisionConfig | Qwen3VLConfig


def encoding_flops(config: Config, maps: int, height: int, width: int) -> float:
    """Floating-point operations of tower and projector over so many tiles, or pictures, of height x width pixels."""
    if isinstance(config, LlavaOnevisionConfig):
        return tower_flops(config, maps)
    vision: Any = config.vision_config
    return maps * merging_tower_flops(config, height // vision.patch_size * (width // vision.patch_size))


def merging_tower_flops(config: Qwen3VLConfig, patches: int) -> float:
    """Operations of a Qwen3-VL's tower and mergers over a picture of so many patches, which all attend to all."""
    vision: Any = config.vision_config
    width = vision.hidden_size
    layer = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * patches**2 * width
    patching = 2 * patches * width * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merged = width * vision.spatial_merge_size**2
    merger = 2 * patches // vision.spatial_merge_size**2 * merged * (merged + vision.out_hidden_size)
    return float(vision.depth * layer + patching + (1 + len(vision.deepstack_visual_indexes)) * merger)


def tower_flops(config: LlavaOnevisionConfig, tiles: int) -> float:
    """Floating-point operations of the vision tower and the projector over so many tiles."""
    vision: Any = config.vision_config
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    depth = vision.num_hidden_layers
    chosen: Any = config.vision_feature_layer
    # Layers behind the last one whose output is read are not run.
    layers = chosen % (depth + 1) if isinstance(chosen, int) else max(index % (depth + 1) for index in chosen)
    layer = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * patches**2 * width
    patching = 2 * patches * width * vision.num_channels * vision.patch_size**2
    text: Any = config.text_config
    projector = 2 * patches * (width * text.hidden_size + text.hidden_size**2)
    return float(tiles * (layers * layer + patching + projector))


def prefill_flops(config: Config, tokens: Sequence[int], layers: Sequence[int]) -> float:
    """Operations of a causal prefill into an empty cache: ``tokens[s]`` in each of ``layers[s]`` layers of stage s."""
    text: Any = config.text_config
    heads_width = _head_dim(config) * text.num_attention_heads
    return float(
        sum(
            depth * (2 * count * _layer_weights(config) + 2 * count**2 * heads_width)
            for count, depth in zip(tokens, layers, strict=True)
        )
    )


def decoder_weights(config: Config) -> int:
    """Numbers that a decode step reads: all layers and the output head."""
    text: Any = config.text_config
    return int(text.num_hidden_layers * _layer_weights(config) + text.vocab_size * text.hidden_size)


def _layer_weights(config: Config) -> int:
    """Numbers in the matrices of a decoder layer."""
    text: Any = config.text_config
    width, head_dim = text.hidden_size, _head_dim(config)
    attention = 2 * width * head_dim * (text.num_attention_heads + text.num_key_value_heads)
    return int(attention + 3 * width * text.intermediate_size)


def _head_dim(config: Config) -> int:
    text: Any = config.text_config
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
