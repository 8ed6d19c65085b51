"""Qwen2-VL: a tower whose patches all see the whole picture."""

from __future__ import annotations

from transformers import Qwen2VLForConditionalGeneration

from vflowopt.models.qwen_vl import QwenVl


class Qwen2Vl(QwenVl):
    """A model of the family ``qwen2_vl``; see :class:`~vflowopt.models.qwen_vl.QwenVl`."""

    family = "Qwen2-VL"
    architecture = Qwen2VLForConditionalGeneration
