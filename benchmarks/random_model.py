"""Models with random weights in the shape of published ones: the time of a step does not depend on the values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vflowopt.demo import model_path
from vflowopt.models.families import FAMILIES
from vflowopt.models.interface import MultimodalModel

_NOISE = 1 << 22
_MOST_TOKENS = 16_384
"""The most visual tokens of a picture in the shape of Qwen3-VL: the default of its image processor."""


def _demo() -> LlavaOnevisionConfig:
    """The embedded model's own."""
    return LlavaOnevisionConfig.from_pretrained(model_path())


def _onevision(text: Qwen2Config, vision: SiglipVisionConfig | None = None) -> LlavaOnevisionConfig:
    """LLaVA-OneVision as published: all sizes share the tower (SigLIP-so400m, its last layer dropped) and its grids."""
    tower = vision or SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    side: Any = tower.image_size
    return LlavaOnevisionConfig(
        vision_config=tower,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)],
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _onevision_05b() -> LlavaOnevisionConfig:
    """``llava-onevision-qwen2-0.5b-ov``."""
    return _onevision(
        Qwen2Config(
            vocab_size=152_000,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=32_768,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=True,
        )
    )


def _onevision_7b() -> LlavaOnevisionConfig:
    """``llava-onevision-qwen2-7b-ov``."""
    return _onevision(
        Qwen2Config(
            vocab_size=152_128,
            hidden_size=3584,
            intermediate_size=18_944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=32_768,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=False,
        )
    )


def _onevision_tiny() -> LlavaOnevisionConfig:
    """Of the same family, and small enough for a rehearsal on a CPU."""
    return _onevision(
        Qwen2Config(
            vocab_size=4096,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
        ),
        SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=56,
            patch_size=14,
            vision_use_head=False,
        ),
    )


def _qwen3_vl_8b() -> Qwen3VLConfig:
    """``Qwen3-VL-8B-Instruct``."""
    return Qwen3VLConfig(
        vision_config={"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
        text_config={
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        tie_word_embeddings=False,
    )


def _qwen3_vl_tiny() -> Qwen3VLConfig:
    """Of the same family, and small enough for a rehearsal on a CPU."""
    return Qwen3VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        text_config={
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        tie_word_embeddings=False,
    )


GEOMETRIES: dict[str, Callable[[], LlavaOnevisionConfig]] = {
    "demo": _demo,
    "onevision-0.5b": _onevision_05b,
    "onevision-7b": _onevision_7b,
}
"""Shapes of models that can be written as folders, by name."""

SHAPES: dict[str, Callable[[], LlavaOnevisionConfig | Qwen3VLConfig]] = {
    **GEOMETRIES,
    "onevision-tiny": _onevision_tiny,
    "qwen3-vl-8b": _qwen3_vl_8b,
    "qwen3-vl-tiny": _qwen3_vl_tiny,
}
"""Shapes of models that can be made in memory, by name."""


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> MultimodalModel:
    """Make a model with random weights where it is to run; no file is written.

    Args:
        shape: a name of :data:`SHAPES`.
        device: where its weights are.
        dtype: their type.
    """
    config: Any = SHAPES[shape]()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    if config.model_type == "qwen3_vl":
        # Tokens of text stand in for those around pictures and videos, of which the tokenizer has none.
        config.vision_start_token_id, config.vision_end_token_id, config.video_token_id = range(1, 4)
    family = FAMILIES[config.model_type]
    with torch.device(device):
        network = family.architecture._from_config(config, dtype=dtype, attn_implementation="sdpa")
    noise = _noise().to(device, dtype)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(_weight(name, weight, noise))
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    return family(network.eval(), tokenizer, _processor(config))


def _processor(config: Any) -> Any:
    vision: Any = config.vision_config
    if config.model_type == "qwen3_vl":
        square = (vision.patch_size * vision.spatial_merge_size) ** 2
        return Qwen2VLImageProcessorPil(
            size={"shortest_edge": 4 * square, "longest_edge": _MOST_TOKENS * square},
            patch_size=vision.patch_size,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        )
    return LlavaOnevisionImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def write_random_model(geometry: str, folder: Path) -> LlavaOnevisionConfig:
    """Write a whole model folder: random weights in bfloat16 and the embedded model's tokenizer.

    Args:
        geometry: a name of :data:`GEOMETRIES`.
        folder: where to; a 7B model takes 16 GB.

    Returns:
        The configuration.
    """
    config: Any = GEOMETRIES[geometry]()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    with torch.device("meta"):
        shapes = LlavaOnevisionForConditionalGeneration(config).state_dict()
    noise = _noise().to(torch.bfloat16)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: _weight(name, empty, noise) for name, empty in shapes.items() if name not in tied},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _processor(config).save_pretrained(folder)
    written: LlavaOnevisionConfig = config
    return written


def _noise() -> Tensor:
    return torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))


def _weight(name: str, empty: Tensor, noise: Tensor) -> Tensor:
    """Values that keep activations about as large as those of a trained model: no overflow, no denormals."""
    if empty.dim() == 1:
        value = 1.0 if "norm" in name and name.endswith("weight") else 0.01
        return torch.full(empty.shape, value, dtype=noise.dtype, device=noise.device)
    # One block of noise, over and over: drawing billions of numbers would take longer than the benchmark.
    values = noise.repeat(-(-empty.numel() // len(noise)))[: empty.numel()].view(empty.shape)
    return values.mul_(empty[0].numel() ** -0.5)
