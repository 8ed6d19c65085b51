"""The model folder: weights, configuration, tokenizer and processor files as the hub keeps them for this family."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from demo_model.anyres import GRIDS, SIDE, TILE
from demo_model.strategies import brought
from demo_model.tokenizer import IMAGE, VIDEO

_HUB_PREFIXES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}


def hub_name(name: str) -> str | None:
    """The name that a tensor of the model has in a hub checkpoint; None for the output head, which is tied."""
    for prefix, hub_prefix in _HUB_PREFIXES.items():
        if name.startswith(prefix):
            return hub_prefix + name.removeprefix(prefix)
    if name == "lm_head.weight":
        return None
    raise KeyError(f"No hub name is known for the tensor {name!r}; add its prefix to _HUB_PREFIXES.")


def processor_settings() -> dict[str, object]:
    """What the family's image processor must do to a picture for this model."""
    size = {"height": TILE, "width": TILE}
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
        "image_grid_pinpoints": [[rows * TILE, columns * TILE] for rows, columns in GRIDS],
    }


def save_folder(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write all that ``from_pretrained`` and vLLM need to ``folder``, the weights in bfloat16 by the hub's names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hub_name(name): tensor for name, tensor in model.state_dict().items()}
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items() if name is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = model.config
    config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    config.dtype = torch.bfloat16
    for part in (config.text_config, config.vision_config):
        setattr(part, "dtype", torch.bfloat16)  # noqa: B010  # typed as a dictionary, too
    config.vflow_strategies = brought(len(model.model.language_model.layers))
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = processor_settings()
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": SIDE * SIDE,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "image_token": IMAGE,
        "video_token": VIDEO,
    }
    for name, content in {
        "preprocessor_config.json": settings | {"processor_class": "LlavaOnevisionProcessor"},
        "processor_config.json": processor,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
