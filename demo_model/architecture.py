"""Shape and initialisation of the embedded model: a LLaVA-OneVision small enough to train on a laptop's processor."""

from math import pi

import torch
from torch import nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from demo_model.anyres import GRIDS, PATCH, SIDE, TILE

WIDTH = 192
READ_LAYERS = 5
"""Tower layers below the features that the language model reads; one scoring layer comes on top."""


def configuration(vocabulary: int, image: int, video: int, end: int, pad: int) -> LlavaOnevisionConfig:
    """The model's configuration.

    Args:
        vocabulary: number of tokens.
        image, video, end, pad: ids of the ``<image>``, ``<video>``, ``<|end|>`` and ``<pad>`` tokens.
    """
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": READ_LAYERS + 1,
            "num_attention_heads": 3,
            "image_size": TILE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[rows * TILE, columns * TILE] for rows, columns in GRIDS],
        vision_feature_layer=-2,
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
    )
    config.vflow_scoring_layer = -1
    return config


def sine_cosine_positions() -> torch.Tensor:
    """2-D sine and cosine table over the patches of a tile, (256, width): half for rows, half for columns."""
    frequencies = 1 / 40 ** (torch.arange(WIDTH // 4) / (WIDTH // 4))
    angles = torch.arange(SIDE)[:, None] * frequencies * pi / 2
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows = line[:, None].expand(-1, SIDE, -1)
    columns = line[None].expand(SIDE, -1, -1)
    return torch.cat([rows, columns], -1).reshape(SIDE * SIDE, WIDTH)


@torch.no_grad()
def _start_looking_up(attention: Qwen2Attention, *, back: bool) -> None:
    """Start a layer where like attends to like and is copied: a word to the patches that show it.

    Queries equal keys in the dimensions that the rotary embedding hardly turns within a picture's length, and the
    output map undoes the value map. With ``back``, half of the heads look a few tokens back instead, whatever is there:
    biases in the dimensions that turn fast. Every question needs both, to gather its words and to find what they name;
    from random maps neither appears before the other does.
    """
    groups, size = attention.num_key_value_groups, attention.head_dim
    half = size // 2
    slow = torch.cat([torch.arange(9, half), torch.arange(half + 9, size)])
    queries = attention.q_proj.weight.view(-1, size, WIDTH)
    keys = attention.k_proj.weight.view(-1, size, WIDTH).repeat_interleave(groups, 0)
    values = attention.v_proj.weight.view(-1, size, WIDTH).repeat_interleave(groups, 0)
    queries[:, slow] = 2.0 * keys[:, slow]
    copied = 0.5 * values
    if back:
        queries[:groups] *= 0.2
        for projection, heads in ((attention.q_proj, groups), (attention.k_proj, 1)):
            projection.bias.view(-1, size)[:heads, 1:7] = 2.9
        copied[:groups] *= 2
    attention.o_proj.weight.copy_(copied.permute(2, 0, 1).reshape(WIDTH, -1))


@torch.no_grad()
def initialise(config: LlavaOnevisionConfig, seed: int) -> LlavaOnevisionForConditionalGeneration:
    """An untrained model in float32, started so that it trains in minutes.

    Linear maps start by fan-in (the library's 0.02 is far too flat at this width), those that write into a residual
    stream smaller by the depth; patch positions from sines and cosines; the final norm at 0.15, since the tied
    embeddings are large.
    """
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            gain = 0.3 if name.endswith(("out_proj", "fc2", "o_proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings = model.model.vision_tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * PATCH * PATCH) ** -0.5)
    nn.init.zeros_(embeddings.patch_embedding.bias)
    embeddings.position_embedding.weight.copy_(0.5 * sine_cosine_positions())
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=1.0)
    nn.init.normal_(model.model.image_newline, std=1.0)
    model.model.language_model.norm.weight.fill_(0.15)
    for number, layer in enumerate(model.model.language_model.layers):
        _start_looking_up(layer.self_attn, back=number % 2 == 0)
    return model


def normalise(tiles: torch.Tensor) -> torch.Tensor:
    """Pixels as the tower takes them: uint8 (n, 224, 224, 3) to float (n, 3, 224, 224) between -1 and 1."""
    return tiles.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
