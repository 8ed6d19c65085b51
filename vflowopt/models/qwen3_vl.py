"""Qwen3-VL: features of several tower layers, added to the outputs of the first decoder layers (deepstack)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from vflowopt.models.qwen_vl import QwenVl


class Qwen3Vl(QwenVl):
    """A model of the family ``qwen3_vl``; see :class:`~vflowopt.models.qwen_vl.QwenVl`.

    All features of a token lie side by side in its embedding: they are kept, dropped and averaged together.
    """

    family = "Qwen3-VL"
    architecture = Qwen3VLForConditionalGeneration

    @property
    def _later(self) -> int:
        return len(self.network.model.visual.deepstack_merger_list)

    def _features(self, output: Any) -> Tensor:
        return torch.cat((output.pooler_output, *output.deepstack_features), dim=-1)
