"""Videos: which frames are one, and what they are called."""

import math

import numpy as np
import pytest

from vflowopt.media.picture import Picture
from vflowopt.media.video import Video, VideoError, VideoLimits


def frame(seed: int, height: int = 20, width: int = 30) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture.from_pixels(pixels)


def test_a_video_is_its_frames_and_their_times() -> None:
    frames = [frame(1), frame(2), frame(3)]
    video = Video.of(frames, (0, 0.5, 1.5))
    assert video.frames == tuple(frames) and video.seconds == (0.0, 0.5, 1.5)
    assert (video.height, video.width) == (20, 30)
    assert video.frames_per_second == pytest.approx(2 / 1.5)
    assert Video.of(frames[:1], (7.0,)).frames_per_second == 1.0


def test_its_identity_is_that_of_frames_and_times() -> None:
    frames = [frame(1), frame(2)]
    same = Video.of([frame(1), frame(2)], (0.0, 1.0)).identity
    assert Video.of(frames, (0.0, 1.0)).identity == same
    others = [
        Video.of(frames, (0.0, 2.0)),
        Video.of(frames[::-1], (0.0, 1.0)),
        Video.of(frames[:1], (0.0,)),
        Video.of([*frames, frame(3)], (0.0, 1.0, 2.0)),
    ]
    assert len({same, *(each.identity for each in others), frames[0].identity}) == 6


@pytest.mark.parametrize(
    ("frames", "seconds", "reason", "message"),
    [
        ([], [], "VIDEO_EMPTY", "has no frames"),
        ([frame(1)] * 5, range(5), "VIDEO_TOO_LONG", "has 5 frames, at most 4"),
        ([frame(1), frame(2, 21)], (0, 1), "VIDEO_FRAMES_UNEQUAL", "frame 1 is 30 x 21 pixels and frame 0 is 30 x 20"),
        ([frame(1, 50, 50)] * 4, range(4), "PICTURE_TOO_MANY_PIXELS", "have 10000 pixels together, at most 9000"),
        ([frame(1), frame(2)], (0,), "VIDEO_TIMES_INVALID", "2 frames and 1 times"),
        ([frame(1), frame(2)], (1, 1), "VIDEO_TIMES_INVALID", "frame 1 was seen at 1 s"),
        ([frame(1)], (-0.5,), "VIDEO_TIMES_INVALID", "frame 0 was seen at -0.5 s"),
        ([frame(1)], (math.nan,), "VIDEO_TIMES_INVALID", "frame 0 was seen at nan s"),
        ([frame(1), frame(2)], (0, math.inf), "VIDEO_TIMES_INVALID", "frame 1 was seen at inf s"),
    ],
)
def test_what_is_no_video_is_refused(
    frames: list[Picture], seconds: tuple[float, ...], reason: str, message: str
) -> None:
    with pytest.raises(VideoError, match=message) as refused:
        Video.of(frames, list(seconds), VideoLimits(max_frames=4, max_pixels=9000))
    assert refused.value.reason == reason
    assert all(isinstance(value, str) for value in refused.value.metadata.values())


@pytest.mark.parametrize("limit", ["max_frames", "max_pixels"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=limit):
        VideoLimits(**{limit: 0})
