"""Small LLaVA-OneVision models with random weights, saved as real ones come, and what other families need, too."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
"""The padding, the beginning and the end of a message, a picture and a video."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'video' %}<video>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Pictures first, then videos, then text, as the published template has it."""


@dataclass(frozen=True)
class Shape:
    """What differs between the models."""

    name: str
    side: int = 56
    patch: int = 14
    tower_layers: int = 3
    tower_width: int = 48
    tower_heads: int = 3
    feature_layer: int = -1
    layers: int = 6
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    aspect: str = "anyres_max_9"
    grids: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
    extra: dict[str, int] = field(default_factory=dict)

    def save(self, folder: Path, seed: int = 0) -> Path:
        """See :func:`save`."""
        return save(self, folder, seed)


SHAPES = (
    Shape("plain"),
    Shape("deep", layers=7, width=48, heads=6, kv_heads=1, tower_layers=2, tower_heads=4),
    Shape("late-score", feature_layer=-2, extra={"vflow_scoring_layer": -1}, width=96, heads=3, kv_heads=3),
    # A mosaic of up to 3 x 3 tiles, but tokens for one tile only: packing shrinks the grid bilinearly.
    Shape("shrunk", aspect="anyres_max_1", side=28, patch=7, grids=((1, 1), (2, 2), (3, 3), (1, 3), (3, 2)), layers=4),
)


def tokenizer(template: str = CHAT_TEMPLATE, specials: Sequence[str] = SPECIALS) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens, of which the first pads and the third ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={token: index for index, token in enumerate([*alphabet, *specials])}, merges=[])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=specials[2],
        pad_token=specials[0],
        extra_special_tokens=[specials[1], *specials[3:]],
        chat_template=template,
    )


def spread(network: PreTrainedModel) -> None:
    """Draw all weights anew: default initialisation is so flat that every answer repeats one token."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.5 * weight[0].numel() ** -0.5)


def save(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Make a model of this shape and save it; returns the folder."""
    tokens = tokenizer()
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            image_size=shape.side,
            patch_size=shape.patch,
            hidden_size=shape.tower_width,
            intermediate_size=2 * shape.tower_width,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=shape.tower_heads,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokens),
            hidden_size=shape.width,
            intermediate_size=2 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
        ),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        vision_feature_layer=shape.feature_layer,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=shape.aspect,
        image_grid_pinpoints=[[rows * shape.side, columns * shape.side] for rows, columns in shape.grids],
        tie_word_embeddings=True,
        **shape.extra,
    )
    torch.manual_seed(seed)
    network = LlavaOnevisionForConditionalGeneration(config)
    spread(network)
    network.generation_config.eos_token_id = tokens.eos_token_id
    network.save_pretrained(folder)
    tokens.save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": shape.side, "width": shape.side},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(folder)
    return folder
