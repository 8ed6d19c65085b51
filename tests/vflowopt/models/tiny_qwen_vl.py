"""Small models of the Qwen-VL families with random weights, saved as the folders that real ones come in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.vflowopt.tiny_models import spread, tokenizer

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A system message unless there is one, then the parts in the order they come in, as the published template has it."""

ARCHITECTURES: dict[str, tuple[type[Any], type[PreTrainedModel]]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}


@dataclass(frozen=True)
class TinyQwenVl:
    """What differs between the models."""

    name: str
    family: str
    patch: int = 14
    depth: int = 3
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    most_tokens: int = 64
    tied: bool = True

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Make the model and save it; returns the folder."""
        tokens = tokenizer(CHAT_TEMPLATE, SPECIALS)
        config_class, network_class = ARCHITECTURES[self.family]
        text = {
            "vocab_size": len(tokens),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": tokens.eos_token_id,
        } | dict(self.text)
        vision = {"depth": self.depth, "num_heads": 2, "patch_size": self.patch} | dict(self.vision)
        config = config_class(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=self.tied,
            **{name: tokens.convert_tokens_to_ids(f"<|{what}|>") for name, what in IDS.items()},
        )
        torch.manual_seed(seed)
        network = network_class(config)
        spread(network)
        for token in (config.image_token_id, config.video_token_id):
            network.lm_head.weight.data[token] = 0.0  # what stands for a picture is no answer
        network.generation_config.eos_token_id = tokens.eos_token_id
        network.save_pretrained(folder)
        tokens.save_pretrained(folder)
        square = (2 * self.patch) ** 2
        Qwen2VLImageProcessorPil(
            size={"shortest_edge": 4 * square, "longest_edge": self.most_tokens * square}, patch_size=self.patch
        ).save_pretrained(folder)
        return folder


IDS = {
    "image_token_id": "image_pad",
    "video_token_id": "video_pad",
    "vision_start_token_id": "vision_start",
    "vision_end_token_id": "vision_end",
}

_WINDOWED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "window_size": 56,
    "tokens_per_second": 2,
}
_STACKED = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 16}
_INTERLEAVED = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}
_NORMED = {"head_dim": 16, "rope_parameters": _INTERLEAVED}

QWEN2_VL = (
    TinyQwenVl("qwen2-vl", "qwen2_vl", vision={"embed_dim": 32, "hidden_size": 64}),
    TinyQwenVl(
        "qwen2-vl-few-pixels",
        "qwen2_vl",
        patch=7,
        vision={"embed_dim": 48, "hidden_size": 64, "num_heads": 3, "mlp_ratio": 2},
        text={"num_key_value_heads": 1, "num_hidden_layers": 7},
        most_tokens=20,
        tied=False,
    ),
)
QWEN2_5_VL = (
    TinyQwenVl("qwen2.5-vl", "qwen2_5_vl", depth=4, vision={**_WINDOWED, "fullatt_block_indexes": [1, 3]}),
    # Two windowed layers behind the one that scores.
    TinyQwenVl("qwen2.5-vl-late-windows", "qwen2_5_vl", depth=4, vision={**_WINDOWED, "fullatt_block_indexes": [1]}),
)
QWEN3_VL = (
    TinyQwenVl(
        "qwen3-vl",
        "qwen3_vl",
        patch=16,
        depth=4,
        vision={**_STACKED, "deepstack_visual_indexes": [0, 1, 2]},
        text=_NORMED,
    ),
    TinyQwenVl(
        "qwen3-vl-one-feature",
        "qwen3_vl",
        patch=16,
        vision={**_STACKED, "deepstack_visual_indexes": [1]},
        text={**_NORMED, "num_key_value_heads": 4},
        tied=False,
    ),
)
