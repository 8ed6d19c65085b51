"""Families that encode the frames of a video like tiles: each by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.media.video import Video
from vflowopt.models.tiled import TiledModel, channels_last

_MOST_FRAMES = 4
"""Frames of a video that are cut and encoded in one piece. The states of hundreds would take gigabytes, and more frames
in a piece take no less time each."""


class TiledVideoModel(TiledModel):
    """A model that takes videos, too. A subclass says how the frames' tokens are packed; see :class:`TiledModel`."""

    def _encoding_video(self, video: Video) -> Pieces[EncodedImage]:
        """Every frame is one tile, which the tower encodes by itself."""
        layout = self._layout_of_frames(video)
        self.check_length(video, len(layout))
        groups: list[np.ndarray] = []

        def cut() -> Iterator[np.ndarray]:
            for first in range(0, len(video.frames), _MOST_FRAMES):
                frames = video.frames[first : first + _MOST_FRAMES]
                groups.append(np.concatenate([self.tiles(frame.in_detail("low")) for frame in frames]))
                yield groups[-1]

        seen = yield from self._looking(cut(), self._project_frames)
        return EncodedImage(
            digest=video.digest,
            embeddings=self._pack_frames(seen.tokens),
            layout=layout,
            query=seen.query,
            key=seen.key,
            scale=self.tower.scale,
            pixels=channels_last(np.concatenate(groups)),
            patch=self.patch,
            arrange=self._arrange_frames,
            class_key=seen.class_key,
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
