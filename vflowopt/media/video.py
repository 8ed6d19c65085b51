"""Video: a clip as a sequence of frames, each with its time in seconds.

The caller decodes the film and chooses the frames. A model reads pictures of one size, and their times.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vflowopt.media.picture import Identity, Picture, PictureError


class VideoError(PictureError):
    """Frames that are no usable video.

    ``reason`` is one of VIDEO_EMPTY, VIDEO_TOO_LONG (frames), PICTURE_TOO_MANY_PIXELS (of all frames together),
    VIDEO_FRAMES_UNEQUAL (of different sizes), VIDEO_TIMES_INVALID (not ascending from 0 on, or farther apart than the
    model has positions for) and VIDEO_UNSUPPORTED (the model takes no videos); ``metadata`` holds the numbers in the
    message.
    """


@dataclass(frozen=True)
class VideoLimits:
    """Limits of a video: its frames, and the pixels of all frames together."""

    max_frames: int = 256
    max_pixels: int = 200_000_000

    def __post_init__(self) -> None:
        """Raise ValueError unless all limits are positive."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, eq=False)
class Video:
    """The frames of one clip.

    Attributes:
        frames: upright pictures of one size, in order.
        seconds: the time of each frame from the beginning of the clip, ascending.
        digest: SHA-256 of the frames' digests and times, in hex.
    """

    frames: tuple[Picture, ...]
    seconds: tuple[float, ...]
    digest: str

    detail: Literal["high"] = "high"
    """Always "high": a model reads a video as closely as its video processor allows."""

    @property
    def identity(self) -> Identity:
        """The key of the video in caches."""
        return self.digest, self.detail

    @property
    def width(self) -> int:
        """Pixels of a frame from left to right."""
        return self.frames[0].width

    @property
    def height(self) -> int:
        """Pixels of a frame from top to bottom."""
        return self.frames[0].height

    @property
    def frames_per_second(self) -> float:
        """Frames per second, on average; 1 for a single frame."""
        if len(self.frames) == 1:
            return 1.0
        return (len(self.frames) - 1) / (self.seconds[-1] - self.seconds[0])

    @classmethod
    def of(cls, frames: Sequence[Picture], seconds: Sequence[float], limits: VideoLimits | None = None) -> Video:
        """A video of these frames at these seconds.

        Raises VideoError.
        """
        limits = limits or VideoLimits()
        if not frames:
            raise VideoError("VIDEO_EMPTY", "the video has no frames; send at least one")
        if len(frames) > limits.max_frames:
            raise VideoError(
                "VIDEO_TOO_LONG",
                f"the video has {len(frames)} frames, at most {limits.max_frames} are accepted; send fewer a second",
                frames=len(frames),
                max_frames=limits.max_frames,
            )
        _check_sizes(frames, limits)
        _check_times(frames, seconds)
        content = "".join(f"{frame.digest}@{float(at)!r};" for frame, at in zip(frames, seconds, strict=True))
        digest = hashlib.sha256(f"video:{content}".encode()).hexdigest()
        return cls(tuple(frames), tuple(map(float, seconds)), digest)


def _check_sizes(frames: Sequence[Picture], limits: VideoLimits) -> None:
    width, height = frames[0].width, frames[0].height
    for index, frame in enumerate(frames):
        if (frame.width, frame.height) != (width, height):
            raise VideoError(
                "VIDEO_FRAMES_UNEQUAL",
                f"frame {index} is {frame.width} x {frame.height} pixels and frame 0 is {width} x {height}; bring all "
                "frames to one size",
                frame=index,
                width=frame.width,
                height=frame.height,
            )
    if (pixels := len(frames) * width * height) > limits.max_pixels:
        raise VideoError(
            "PICTURE_TOO_MANY_PIXELS",
            f"the {len(frames)} frames of {width} x {height} have {pixels} pixels together, at most "
            f"{limits.max_pixels} are accepted; scale them down, or send fewer",
            width=width,
            height=height,
            max_pixels=limits.max_pixels,
        )


def _check_times(frames: Sequence[Picture], seconds: Sequence[float]) -> None:
    if len(seconds) != len(frames):
        raise VideoError(
            "VIDEO_TIMES_INVALID",
            f"the video has {len(frames)} frames and {len(seconds)} times; give one for each",
            frames=len(frames),
            times=len(seconds),
        )
    before = -math.inf
    for index, at in enumerate(seconds):
        if not (math.isfinite(at) and at >= 0 and at > before):
            raise VideoError(
                "VIDEO_TIMES_INVALID",
                f"frame {index} was seen at {at} s; give seconds from the beginning of the clip, each later than the "
                "one before",
                frame=index,
                seconds=at,
            )
        before = at


Visual = Picture | Video
"""A visual part of a conversation."""
