"""Small InternVL models with random weights, saved as the folders that real ones come in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.vflowopt.tiny_models import spread, tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")

NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The parts in the order they come in, a line break behind each picture, as the published template has it."""


@dataclass(frozen=True)
class TinyInternVL:
    """What differs between the models."""

    name: str
    side: int = 56
    most_tiles: int = 4
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=lambda: {"model_type": "qwen2"})
    feature_layer: int = -1
    extra: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Make the model and save it; returns the folder."""
        plain = tokenizer(CHAT_TEMPLATE, SPECIALS)
        tokens = PreTrainedTokenizerFast(
            tokenizer_object=plain.backend_tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            extra_special_tokens=NAMES | {"begin_message_token": "<|im_start|>"},
            chat_template=CHAT_TEMPLATE,
        )
        text = {
            "vocab_size": len(tokens),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        } | dict(self.text)
        vision = {
            "image_size": self.side,
            "patch_size": 14,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
        } | dict(self.vision)
        config = InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
            vision_feature_layer=self.feature_layer,
            tie_word_embeddings=False,
            **self.extra,
        )
        torch.manual_seed(seed)
        network = InternVLForConditionalGeneration(config)
        spread(network)
        network.lm_head.weight.data[network.config.image_token_id] = 0.0  # what stands for a picture is no answer
        network.generation_config.eos_token_id = tokens.eos_token_id
        network.save_pretrained(folder)
        tokens.save_pretrained(folder)
        GotOcr2ImageProcessorPil(
            size={"height": self.side, "width": self.side}, max_patches=self.most_tiles
        ).save_pretrained(folder)
        return folder


INTERNVL = (
    # As InternVL3 has it: angles that change beyond a context, which is short here.
    TinyInternVL(
        "internvl",
        text={
            "model_type": "qwen2",
            "max_position_embeddings": 384,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    TinyInternVL(
        "internvl-normed",
        side=28,
        most_tiles=6,
        vision={
            "patch_size": 7,
            "use_qk_norm": True,
            "norm_type": "rms_norm",
            "use_mean_pooling": False,
            "attention_bias": True,
        },
        text={"model_type": "qwen3", "head_dim": 16},
        extra={"vflow_scoring": "cls"},
    ),
    # Features of an earlier layer are taken without the tower's last norm.
    TinyInternVL(
        "internvl-early",
        vision={"use_mean_pooling": False},
        text={"model_type": "llama", "num_key_value_heads": 1},
        feature_layer=-2,
    ),
)
