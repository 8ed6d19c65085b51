"""Qwen2.5-VL: a tower most of whose layers see windows only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from vflowopt.media.video import Video, VideoError
from vflowopt.models.qwen_vl import QwenVl


class Qwen25Vl(QwenVl):
    """A model of the family ``qwen2_5_vl``; see :class:`~vflowopt.models.qwen_vl.QwenVl`.

    Attention within a window says nothing about the whole picture, so tokens are scored by the last layer with full
    attention. The tower orders the patches window by window, and restores their order after its last layer.
    """

    family = "Qwen2.5-VL"
    architecture = Qwen2_5_VLForConditionalGeneration

    def _whole_layers(self) -> Sequence[int]:
        vision = self.network.config.vision_config
        whole = sorted(layer for layer in vision.fullatt_block_indexes if layer < vision.depth)
        if not whole:
            raise self.unsupported("a vision tower without a layer that sees the whole picture")
        return whole

    def _positions_per_step(self, video: Video) -> float:
        per_second: float = self.network.config.vision_config.tokens_per_second
        lasts = video.seconds[-1] - video.seconds[0]
        if lasts * per_second >= self.context:
            raise VideoError(
                "VIDEO_TIMES_INVALID",
                f"the clip lasts {lasts:g} s, and the model has {self.context} positions, {per_second:g} for each "
                "second; show a shorter part of it",
                frame=len(video.seconds) - 1,
                seconds=video.seconds[-1],
            )
        return per_second * self.step / video.frames_per_second

    def _squares(self, grids: Tensor) -> Tensor:
        tower = self.network.model.visual
        in_windows, _ = get_vision_window_index(
            grids, spatial_merge_size=self.merge, window_size=tower.window_size, patch_size=self.patch
        )
        return in_windows.argsort()
