"""What Hugging Face's models take of videos, made without their video processors, which need torchvision."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_together

from vflowopt.media.video import Video


class VideoInputs:
    """Inputs of a network for some videos, and the tokens that stand for each.

    Attributes:
        token: id of the token that stands for a video before it is written out, or -1.
        standing: for each video, the ids of the tokens that it is written out as.
    """

    def __init__(self, network: Any, tokenizer: Any, processor: Any, videos: Sequence[Video]) -> None:
        self._config = network.config
        self._tokenizer = tokenizer
        self._processor = processor
        self._inputs: dict[str, Tensor] = {}
        self.token = -1
        self.standing: list[list[int]] = []
        if not videos:
            return
        kind = self._config.model_type
        if kind == "internvl":
            self.token = tokenizer.video_token_id
            self._tiles(videos)
        elif kind == "llava_onevision":
            self.token = self._config.video_token_id
            self._pooled(videos)
        else:
            self.token = self._config.video_token_id
            self._patches(videos)

    def with_single_marks(self, text: str) -> str:
        """The text of a prompt with one token for each video."""
        if self.token >= 0 and self._config.model_type == "qwen3_vl":
            return text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
        return text

    def add_to(self, inputs: dict[str, Tensor], before: int) -> None:
        """Add the inputs; where pictures and frames are one list, behind ``before`` pictures, of a tile each."""
        for name, values in self._inputs.items():
            if name in inputs:
                values = torch.cat((inputs[name][:before], values, inputs[name][before:]))
            inputs[name] = values

    def _overview(self, pixels: np.ndarray, **options: Any) -> Tensor:
        batch = self._processor(pixels, return_tensors="pt", input_data_format="channels_last", **options)
        tile: Tensor = batch["pixel_values"].flatten(0, -4)[0]
        return tile

    def _pooled(self, videos: Sequence[Video]) -> None:
        frames = [torch.stack([self._overview(frame.pixels) for frame in video.frames]) for video in videos]
        self._inputs["pixel_values_videos"] = torch.stack(frames)
        vision = self._config.vision_config
        side = ceil(vision.image_size // vision.patch_size / 2)
        self.standing = [[self.token] * (len(video.frames) * side**2 + 1) for video in videos]

    def _tiles(self, videos: Sequence[Video]) -> None:
        frames = [self._overview(frame.pixels, crop_to_patches=False) for video in videos for frame in video.frames]
        self._inputs["pixel_values"] = torch.stack(frames)
        vision = self._config.vision_config
        tokens = int((vision.image_size[0] // vision.patch_size[0] * self._config.downsample_ratio) ** 2)
        frame = f"<img>{'<IMG_CONTEXT>' * tokens}</img>"
        for video in videos:
            text = "\n".join(f"Frame{number + 1}: {frame}" for number in range(len(video.frames)))
            self.standing.append(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _patches(self, videos: Sequence[Video]) -> None:
        vision = self._config.vision_config
        patches, grids = [], []
        for video in videos:
            frames = self._normalised(video)
            of_video, *grid = Qwen3VLVideoProcessor.patchify(
                None, frames[None], vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
            )
            patches.append(of_video[0])
            grids.append(grid)
            self.standing.append(self._steps(video, grid))
        self._inputs["pixel_values_videos"] = torch.cat(patches)
        self._inputs["video_grid_thw"] = torch.tensor(grids)
        if self._config.model_type == "qwen2_5_vl":
            apart = [vision.temporal_patch_size / video.frames_per_second for video in videos]
            self._inputs["second_per_grid_ts"] = torch.tensor(apart)

    def _normalised(self, video: Video) -> Tensor:
        vision, processor = self._config.vision_config, self._processor
        factor = vision.patch_size * vision.spatial_merge_size
        limits = {"min_pixels": processor.size["shortest_edge"], "max_pixels": processor.size["longest_edge"]}
        if self._config.model_type == "qwen3_vl":
            count = max(len(video.frames), vision.temporal_patch_size)
            height, width = smart_resize_together(
                count, video.height, video.width, vision.temporal_patch_size, factor, **limits
            )
        else:
            height, width = smart_resize(video.height, video.width, factor, **limits)
        frames = [
            np.asarray(Image.fromarray(frame.pixels).resize((width, height), Image.Resampling.BICUBIC))
            for frame in video.frames
        ]
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() * processor.rescale_factor
        return (pixels - mean) / std

    def _steps(self, video: Video, grid: Sequence[int]) -> list[int]:
        vision = self._config.vision_config
        tokens = [self.token] * (grid[1] * grid[2] // vision.spatial_merge_size**2)
        if self._config.model_type != "qwen3_vl":
            return tokens * grid[0]
        step = vision.temporal_patch_size
        seconds = [*video.seconds, *video.seconds[-1:] * (-len(video.seconds) % step)]
        ids: list[int] = []
        for index in range(0, len(seconds), step):
            at = (seconds[index] + seconds[index + step - 1]) / 2
            ids += self._tokenizer(f"<{at:.1f} seconds>", add_special_tokens=False)["input_ids"]
            ids += [self._config.vision_start_token_id, *tokens, self._config.vision_end_token_id]
        return ids
