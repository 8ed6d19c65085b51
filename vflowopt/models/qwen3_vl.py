"""Qwen3-VL: features of several tower layers, added to the outputs of the first decoder layers (deepstack)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.media.video import Video
from vflowopt.models.frame_text import with_text
from vflowopt.models.qwen_vl import QwenVl


class Qwen3Vl(QwenVl):
    """A model of the family ``qwen3_vl``; see :class:`~vflowopt.models.qwen_vl.QwenVl`.

    All features of a token are side by side in its embedding: they are kept, dropped and averaged together.

    Every step of a video is a part by itself, after a text with its time.
    """

    family = "Qwen3-VL"
    architecture = Qwen3VLForConditionalGeneration
    usual_video_size = (128 * 32**2, 768 * 32**2)

    @property
    def _later(self) -> int:
        return len(self.network.model.visual.deepstack_merger_list)

    def _features(self, output: Any) -> Tensor:
        return torch.cat((output.pooler_output, *output.deepstack_features), dim=-1)

    def _video_mark(self) -> str | None:
        # All three are written anew for each step of frames.
        return "".join(
            self.tokenizer.convert_ids_to_tokens([self._begin, self.network.config.video_token_id, self._end])
        )

    @property
    def _begin(self) -> int:
        token: int = self.network.config.vision_start_token_id
        return token

    @property
    def _end(self) -> int:
        token: int = self.network.config.vision_end_token_id
        return token

    def _frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width that frames are resized to, all of them together within :attr:`video_size`."""
        size: tuple[int, int] = smart_resize(
            max(frames, self.step),
            height,
            width,
            temporal_factor=self.step,
            factor=self.patch * self.merge,
            min_pixels=self.video_size[0],
            max_pixels=self.video_size[1],
        )
        return size

    def _encoding_video(self, video: Video) -> Pieces[EncodedImage]:
        encoded = yield from super()._encoding_video(video)
        seconds = [*video.seconds, *video.seconds[-1:] * (-len(video.seconds) % self.step)]
        texts: list[list[int]] = []
        for first, last in zip(seconds[:: self.step], seconds[self.step - 1 :: self.step], strict=True):
            ids = self.tokenizer(f"<{(first + last) / 2:.1f} seconds>", add_special_tokens=False)["input_ids"]
            texts.append([*([self._end] if texts else []), *ids, self._begin])
        return with_text(encoded, [*texts, [self._end]], self.decoder.embed_tokens)
