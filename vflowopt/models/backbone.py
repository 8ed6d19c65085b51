"""Which language models are supported as decoders."""

from __future__ import annotations

from typing import Any

BACKBONES = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text")
"""Decoders that are tested here, by the ``model_type`` of their configuration."""


def unservable(text: Any) -> str | None:
    """Why a decoder with the configuration ``text`` is not supported: it would run, and give wrong answers.

    Returns:
        The reason, or None if it is supported.
    """
    if text.model_type not in BACKBONES:  # a mixture of experts, for one, is a family of its own
        return f"a decoder of the family {text.model_type!r} (supported: {', '.join(BACKBONES)})"
    kinds = getattr(text, "layer_types", None)
    if getattr(text, "sliding_window", None) is not None if kinds is None else "sliding_attention" in kinds:
        return "sliding-window layers in the decoder"
    # Those of type "dynamic" change only beyond the context, which no sequence exceeds.
    if (getattr(text, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        return "rotary embeddings of type 'longrope', whose angles change as a sequence grows,"
    return None
