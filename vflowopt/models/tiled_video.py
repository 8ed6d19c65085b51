"""Families that encode the frames of a video like tiles: each by itself."""

from __future__ import annotations

import time
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.media.video import Video
from vflowopt.models.tiled import TiledModel, channels_last

_MOST_FRAMES = 16
"""Frames of a video that the tower encodes in one batch: the states of hundreds would take gigabytes."""


class TiledVideoModel(TiledModel):
    """A model that takes videos, too. A subclass says how the frames' tokens are packed; see :class:`TiledModel`."""

    def _encode_video(self, video: Video) -> EncodedImage:
        """Every frame is one tile, which the tower encodes by itself."""
        begun = time.perf_counter()
        layout = self._layout_of_frames(video)
        self.check_length(video, len(layout))
        frames = np.concatenate([self.tiles(frame.in_detail("low")) for frame in video.frames])
        projected, queries, keys, class_keys = [], [], [], []
        for first in range(0, len(frames), _MOST_FRAMES):
            features, query, key, class_key = self._look(frames[first : first + _MOST_FRAMES])
            projected.append(self._project_frames(features))
            queries.append(query)
            keys.append(key)
            class_keys += [] if class_key is None else [class_key]
        return EncodedImage(
            digest=video.digest,
            embeddings=self._pack_frames(torch.cat(projected)),
            layout=layout,
            query=torch.cat(queries),
            key=torch.cat(keys),
            scale=self.tower.scale,
            pixels=channels_last(frames),
            patch=self.patch,
            arrange=self._arrange_frames,
            encode_ms=self.milliseconds_since(begun),
            class_key=torch.cat(class_keys) if class_keys else None,
            merge=self.merge,
            frames=len(video.frames),
        )

    def _project_frames(self, features: Tensor) -> Tensor:
        """Features of some frames to tokens; a family that pools them does it here, before more are encoded."""
        return self._project(features)

    @abstractmethod
    def _pack_frames(self, projected: Tensor) -> Tensor:
        """A video's tokens [frames, tokens, hidden], in the order in which the decoder reads them: [N, hidden]."""

    @abstractmethod
    def _arrange_frames(self, values: Tensor) -> Tensor:
        """A video's values per patch, [frames, patches], through the same: [N]."""

    @abstractmethod
    def _layout_of_frames(self, video: Video) -> TokenLayout:
        """Where the tokens of a video come from; each frame is a grid."""
