"""From a folder, a cached hub id, or a model that Hugging Face has loaded already, to a model that can be served."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.image_processing_backends import PilBackend
from transformers.utils.hub import cached_file

from vflowopt.models.error import ModelError
from vflowopt.models.families import FAMILIES
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.model_folder import check_family, find_model, first_line, unreadable_configuration
from vflowopt.models.origin import ModelOrigin
from vflowopt.models.quantization import quantization as quantization_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number types a model can be loaded in, by name."""


def load_model(
    model: str | Path, *, device: str = "cpu", dtype: str = "float32", quantization: str | None = None
) -> MultimodalModel:
    """Load a model of a known family.

    Args:
        model: a local folder in Hugging Face's layout, or the id of a model in the local hub cache (or on the hub,
            where the machine reaches it).
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: a name of :data:`DTYPES`.
        quantization: a name of :data:`vflowopt.models.quantization.QUANTIZATIONS`, to store the weights in fewer bits;
            None: the weights stay as they are, which may be quantized already.

    Raises:
        ModelError: there is no such model, its family is unknown, or its files are not a whole model with a chat
            template that takes pictures.
    """
    if dtype not in DTYPES:
        raise ModelError("MODEL_UNSUPPORTED", f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            "MODEL_UNSUPPORTED", f"device is {device!r} but this torch sees no GPU; use device 'cpu' or a CUDA build"
        )
    model = find_model(model)
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise unreadable_configuration(model, error) from error
    check_family(model, config.model_type)
    quantizing = None if quantization is None else quantization_config(quantization, config, DTYPES[dtype])
    try:
        loaded = FAMILIES[config.model_type].load(model, config, torch.device(device), DTYPES[dtype], quantizing)
    except ImportError as error:
        raise ModelError(
            "MODEL_UNSUPPORTED",
            f"what quantizes the weights of {model!s} is not installed: {first_line(error)}; "
            "pip install 'vflowopt[quantization]' has bitsandbytes",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            "MODEL_UNREADABLE",
            f"{model!s} has a configuration of family {config.model_type!r} but does not load: {first_line(error)}; "
            "a whole model has weights, tokenizer, chat template and image processor configuration",
        ) from error
    _check(model, loaded)
    folder = Path(model) if Path(model).is_dir() else Path(str(cached_file(str(model), "config.json"))).parent
    loaded.origin = ModelOrigin(folder, quantization)
    return loaded


def wrap_model(network: Any, tokenizer: Any, image_processor: Any) -> MultimodalModel:
    """Wrap a model of a known family that is loaded already, and leave it as it is.

    Both use the same weights: no weight is in memory twice, and a change of one model, for example by training, changes
    both. Nothing else is shared. ``network`` keeps its attention implementation, its hooks and its mode, and can still
    generate.

    The decoder runs as Hugging Face's own modules, adapters included. A model of :func:`load_model` decodes faster if
    its weights can be fused. A Qwen-VL resizes frames to the family's default range of pixels; set ``video_size`` of
    the result to change it.

    Args:
        network: Hugging Face's whole model, such as a ``LlavaOnevisionForConditionalGeneration``, all on one device.
        tokenizer: its tokenizer, with the chat template that knows pictures.
        image_processor: its image processor, as ``AutoImageProcessor.from_pretrained(..., backend="pil")`` makes it.

    Raises:
        ModelError: the model is of no known family, has something that is not supported, or lies on several devices,
            or the tokenizer or the image processor does not fit.
    """
    kind = getattr(getattr(network, "config", None), "model_type", None)
    family = FAMILIES.get(str(kind))
    if family is None or not isinstance(network, family.architecture):
        known = ", ".join(each.architecture.__name__ for each in FAMILIES.values())
        raise ModelError("MODEL_FAMILY_UNKNOWN", f"got a {type(network).__name__}; give one of: {known}")
    if len(devices := {weight.device for weight in network.parameters()}) != 1 or torch.device("meta") in devices:
        found = ", ".join(sorted(map(str, devices)))
        raise ModelError("MODEL_UNSUPPORTED", f"the model lies on {found}; load it whole onto one device")
    if not isinstance(image_processor, PilBackend):
        raise ModelError(
            "MODEL_UNSUPPORTED",
            f"got a {type(image_processor).__name__} as image processor; give the one that "
            'AutoImageProcessor.from_pretrained(..., backend="pil") makes',
        )
    wrapped = family(_view(network).eval(), tokenizer, image_processor)
    wrapped.shared = True
    _check(network.config.name_or_path or type(network).__name__, wrapped)
    return wrapped


def _view(network: nn.Module) -> nn.Module:
    """New modules that share the weights and buffers."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def _check(model: str | Path, loaded: MultimodalModel) -> None:
    """Raise ModelError for problems that would otherwise first appear in a user's turn."""
    _check_chat_template(model, loaded)
    _ = loaded.strategies


def _check_chat_template(model: str | Path, loaded: MultimodalModel) -> None:
    """Raise ModelError unless the chat template writes a picture."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        problem = None if loaded.image_token in text else f"it does not write {loaded.image_token!r} for a picture"
    except Exception as error:  # a template is a program, and may raise any exception
        problem = first_line(error)
    if problem:
        raise ModelError(
            "MODEL_UNSUPPORTED",
            f"the chat template of {model!s} cannot be used: {problem}; put one that takes contents as lists of parts, "
            "pictures among them, into chat_template.jinja beside the tokenizer",
        )
