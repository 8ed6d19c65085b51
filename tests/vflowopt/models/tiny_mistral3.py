"""Small Mistral 3 models with random weights, saved as the folders that real ones come in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tests.vflowopt.tiny_models import spread, tokenizer

SPECIALS = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")

CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '[IMG]' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '[/INST]' }}"
    "{% else %}{{ message['content'][0]['text'] + '</s>' }}{% endif %}{% endfor %}"
)
"""The parts in the order they come in, as the published template has it (that has a system prompt, too)."""


@dataclass(frozen=True)
class TinyMistral3:
    """What differs between the models."""

    name: str
    merge: int = 2
    longest_edge: int = 224
    feature_layer: int = -1
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Make the model and save it; returns the folder."""
        tokens = tokenizer(CHAT_TEMPLATE, SPECIALS)
        text = {
            "model_type": "mistral",
            "vocab_size": len(tokens),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,  # not what hidden size and heads would give, as in the published model
            "max_position_embeddings": 8192,
            "sliding_window": None,
        } | dict(self.text)
        vision = {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "head_dim": 16,
            "patch_size": 14,
            "image_size": self.longest_edge,
        } | dict(self.vision)
        config = Mistral3Config(
            vision_config=vision,
            text_config=text,
            image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
            vision_feature_layer=self.feature_layer,
            spatial_merge_size=self.merge,
            tie_word_embeddings=False,
        )
        torch.manual_seed(seed)
        network = Mistral3ForConditionalGeneration(config)
        spread(network)
        network.lm_head.weight.data[config.image_token_id] = 0.0  # what stands for a picture is no answer
        network.generation_config.eos_token_id = tokens.eos_token_id
        network.save_pretrained(folder)
        tokens.save_pretrained(folder)
        # The patch of the file is the tower's; the model's processor asks for squares of patches.
        PixtralImageProcessorPil(
            size={"longest_edge": self.longest_edge}, patch_size={"height": 14, "width": 14}
        ).save_pretrained(folder)
        return folder


MISTRAL3 = (
    TinyMistral3("mistral3"),
    TinyMistral3(
        "mistral3-early",
        merge=1,
        longest_edge=168,
        feature_layer=-2,
        vision={"num_attention_heads": 4, "head_dim": 8},
        text={"num_key_value_heads": 4},
    ),
)
