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
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from vflowopt.demo import model_path

_NOISE = 1 << 22


def _demo() -> LlavaOnevisionConfig:
    """The embedded model's own."""
    return LlavaOnevisionConfig.from_pretrained(model_path())


def _onevision(text: Qwen2Config) -> LlavaOnevisionConfig:
    """LLaVA-OneVision as published: all sizes share the tower (SigLIP-so400m, its last layer dropped) and its grids."""
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
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


GEOMETRIES: dict[str, Callable[[], LlavaOnevisionConfig]] = {
    "demo": _demo,
    "onevision-0.5b": _onevision_05b,
    "onevision-7b": _onevision_7b,
}
"""Shapes of models, by name."""


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
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: _weight(name, empty, noise) for name, empty in shapes.items() if name not in tied},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = config.vision_config.image_size
    LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(folder)
    written: LlavaOnevisionConfig = config
    return written


def _weight(name: str, empty: Tensor, noise: Tensor) -> Tensor:
    """Values that keep activations about as large as those of a trained model: no overflow, no denormals."""
    if empty.dim() == 1:
        return torch.full(empty.shape, 1.0 if "norm" in name and name.endswith("weight") else 0.01, dtype=noise.dtype)
    # One block of noise, over and over: drawing billions of numbers would take longer than the benchmark.
    values = noise.repeat(-(-empty.numel() // len(noise)))[: empty.numel()].view(empty.shape)
    return values.mul_(empty[0].numel() ** -0.5)
