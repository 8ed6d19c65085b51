"""A video as a caller passes it, and its conversion to the contract's `Video`.

This module knows no video formats: the caller decodes a film and chooses its frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vflow_client.image_source import ImageSource, is_one_image, to_image
from vflow_client.v1 import images_pb2


@dataclass(frozen=True)
class Video:
    """The frames of a clip and their times, given by either `fps` or `seconds`.

    Attributes:
        frames: pictures of one size, in order, each a path, the bytes of a picture file, a PIL image,
            or `Image(digest=...)`.
        fps: frames per second, the first at second 0.
        seconds: the time of each frame from the beginning of the clip, each later than the one before.
    """

    frames: Sequence[ImageSource]
    fps: float | None = None
    seconds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Raises TypeError if `frames` is a single picture or film, ValueError if the times do not match the frames."""
        if is_one_image(self.frames):
            raise TypeError("frames must be a sequence of pictures, got one; a film must be split into frames")
        if (self.fps is None) == (self.seconds is None):
            raise ValueError("give either fps, the frames per second, or seconds, the time of each frame")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; give the frames per second, more than 0")
        if self.seconds is not None and len(self.seconds) != len(self.frames):
            raise ValueError(f"there are {len(self.frames)} frames and {len(self.seconds)} seconds; give one for each")


def to_video(video: Video) -> images_pb2.Video:
    """The message for `video`; reads the files of the frames.

    Raises:
        OSError: a frame's path that cannot be read.
        TypeError: a frame that is no `ImageSource`.
    """
    seconds = video.seconds
    if seconds is None:
        assert video.fps is not None, "one of the two is given"
        seconds = [number / video.fps for number in range(len(video.frames))]
    timed_frames = zip(video.frames, seconds, strict=True)
    return images_pb2.Video(frames=[images_pb2.Frame(image=to_image(frame), seconds=at) for frame, at in timed_frames])
