"""Qwen2-VL: a tower whose patches all see the whole picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from vflowopt.models.qwen_vl import QwenVl


class Qwen2Vl(QwenVl):
    """A model of the family ``qwen2_vl``; see :class:`~vflowopt.models.qwen_vl.QwenVl`."""

    family = "Qwen2-VL"
    architecture = Qwen2VLForConditionalGeneration

    def _whole_layers(self) -> Sequence[int]:
        return range(self.network.config.vision_config.depth)

    def _features(self, output: Any) -> Tensor:
        features: Tensor = output.pooler_output
        return features

    def _squares(self, grids: Tensor) -> Tensor:
        return torch.arange(int(grids.prod(-1).sum()) // self.merge**2)
