"""A video as a caller hands it over, and how it becomes the contract's `Video`.

Knows no film format: which frames of a film to show, and how to decode them, is the caller's choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vflow_client.image_source import ImageSource, to_image
from vflow_client.v1 import images_pb2


@dataclass(frozen=True)
class Video:
    """The frames of a clip, and when each was seen: by `fps` or by `seconds`, of which one is given.

    Attributes:
        frames: pictures of one size in the order in which they were seen, each a path, the bytes of a picture file,
            a PIL image, or `Image(digest=...)`.
        fps: frames in a second, the first at second 0.
        seconds: when each frame was seen, from the beginning of the clip, each later than the one before.
    """

    frames: Sequence[ImageSource]
    fps: float | None = None
    seconds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError where it is not clear what the frames are, or when they were seen."""
        if isinstance(self.frames, str | bytes | bytearray | memoryview):
            raise TypeError("frames must be a sequence of pictures, got one; a film must be taken apart into frames")
        if (self.fps is None) == (self.seconds is None):
            raise ValueError("give either fps, the frames in a second, or seconds, when each frame was seen")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; give the frames in a second, more than 0")
        if self.seconds is not None and len(self.seconds) != len(self.frames):
            raise ValueError(f"there are {len(self.frames)} frames and {len(self.seconds)} seconds; give one for each")


def to_video(video: Video) -> images_pb2.Video:
    """The message for `video`, with the frames read.

    Raises:
        OSError: a frame's path that cannot be read.
        TypeError: a frame in none of the forms of `ImageSource`.
    """
    seconds = video.seconds
    if seconds is None:
        assert video.fps is not None, "one of the two is given"
        seconds = [number / video.fps for number in range(len(video.frames))]
    shown = zip(video.frames, seconds, strict=True)
    return images_pb2.Video(frames=[images_pb2.Frame(image=to_image(frame), seconds=at) for frame, at in shown])
