"""Weights in fewer bits: the configuration of Hugging Face's quantizers, which do the work."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils.import_utils import is_accelerate_available

from vflowopt.models.error import ModelError

QUANTIZATIONS = ("8bit", "4bit")
"""How weights can be quantized while they are read: LLM.int8 and NF4, both by bitsandbytes."""


def quantization(name: str, config: Any, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Hugging Face's configuration for quantizing weights.

    Args:
        name: one of :data:`QUANTIZATIONS`.
        config: the model's configuration.
        dtype: type that the quantized weights are multiplied in.

    Raises:
        ModelError: there is no such quantization, or the weights are quantized already.
    """
    if name not in QUANTIZATIONS:
        raise ModelError("MODEL_UNSUPPORTED", f"quantization is {name!r}; choose one of {', '.join(QUANTIZATIONS)}")
    if is_quantized(config):
        raise ModelError("MODEL_UNSUPPORTED", "the model's weights are quantized already; leave the quantization out")
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quantized_on(device: torch.device, config: Any, quantization: BitsAndBytesConfig | None) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for a model with quantized weights; none for a model without.

    Args:
        device: where the weights are quantized, because they cannot always be moved afterwards.
        config: the model's configuration.
        quantization: quantizes the weights while they are read; None: the weights stay as they are.

    Raises:
        ModelError: what places weights is not installed.
    """
    if quantization is None and not is_quantized(config):
        return {}
    if not is_accelerate_available():
        raise ModelError(
            "MODEL_UNSUPPORTED",
            "quantized weights need accelerate, which is not installed; pip install 'vflowopt[quantization]'",
        )
    asked = {} if quantization is None else {"quantization_config": quantization}
    return {"device_map": {"": device}, **asked}


def is_quantized(config: Any) -> bool:
    """Whether a configuration says that the model's weights are quantized already."""
    return getattr(config, "quantization_config", None) is not None
