"""Small LLaVA-1.5 and LLaVA-NeXT models with random weights, saved as the folders that real ones come in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.vflowopt.tiny_models import spread, tokenizer

SPECIALS = ("<pad>", "<unk>", "</s>", "<image>", "<s>")

_IMAGES = (
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
)

VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    + _IMAGES
    + "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Pictures first, then text; nothing but a space ends a message, as LLaVA-1.5's published template has it."""

MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + _IMAGES
    + "{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
"""As LLaVA-NeXT's published template for Mistral has it: no words ask for an answer."""


@dataclass(frozen=True)
class TinyLlava:
    """What differs between the models; LLaVA-NeXT's are those that have grids of tiles."""

    name: str
    processor: type[Any] = CLIPImageProcessorPil
    processing: Mapping[str, Any] = field(default_factory=dict)
    template: str = VICUNA
    tower: str = "clip_vision_model"
    side: int = 56
    patch: int = 14
    feature_layer: int | Sequence[int] = -2
    text: Mapping[str, Any] = field(default_factory=lambda: {"model_type": "llama"})
    grids: Sequence[tuple[int, int]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Make the model and save it; returns the folder."""
        tokens = opening(tokenizer(self.template, SPECIALS))
        text = {
            "vocab_size": len(tokens),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        } | dict(self.text)
        vision = {
            "model_type": self.tower,
            "image_size": self.side,
            "patch_size": self.patch,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
        }
        if self.tower == "siglip_vision_model":
            vision["vision_use_head"] = False
        shared: dict[str, Any] = {
            "vision_config": vision,
            "text_config": text,
            "image_token_index": tokens.convert_tokens_to_ids("<image>"),
            "vision_feature_layer": self.feature_layer,
            "vision_feature_select_strategy": "default" if self.tower == "clip_vision_model" else "full",
            **self.extra,
        }
        processing = dict(self.processing)
        torch.manual_seed(seed)
        if self.grids:
            points = [[rows * self.side, columns * self.side] for rows, columns in self.grids]
            processing |= {"image_grid_pinpoints": points}
            network = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared, image_grid_pinpoints=points))
        else:
            network = LlavaForConditionalGeneration(LlavaConfig(**shared))
        spread(network)
        network.lm_head.weight.data[network.config.image_token_id] = 0.0  # what stands for a picture is no answer
        network.generation_config.eos_token_id = tokens.eos_token_id
        network.save_pretrained(folder)
        tokens.save_pretrained(folder)
        self.processor(**processing).save_pretrained(folder)
        return folder


def opening(tokens: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let a tokenizer put ``<s>`` before everything, as those of Llama and Mistral do."""
    tokens.add_special_tokens({"bos_token": "<s>"})
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokens.bos_token_id)]
    )
    return tokens


def _cropped(side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


_QWEN = {"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": None}
_MISTRAL = {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}

LLAVA = (
    TinyLlava("llava-1.5", processing=_cropped(56)),
    TinyLlava(
        "llava-padded",
        processor=LlavaImageProcessorPil,
        processing={**_cropped(70), "do_pad": True},
        side=70,
        feature_layer=[-2, -3],
        extra={"vflow_scoring": "cls"},
    ),
    TinyLlava(
        "llava-siglip",
        processor=SiglipImageProcessorPil,
        processing={"size": {"height": 56, "width": 56}},
        tower="siglip_vision_model",
        feature_layer=-1,
        text=_QWEN,
    ),
)

_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

LLAVA_NEXT = (
    TinyLlava("llava-next-vicuna", LlavaNextImageProcessorPil, _cropped(56), grids=_GRIDS),
    TinyLlava(
        "llava-next-mistral",
        LlavaNextImageProcessorPil,
        _cropped(28),
        template=MISTRAL,
        side=28,
        patch=7,
        text=_MISTRAL,
        grids=_GRIDS,
        extra={"vflow_scoring": "cls"},
    ),
)
