"""The forms in which a video may be handed over."""

from typing import Any

import pytest

from vflow_client import Image, Video
from vflow_client.video_source import to_video


@pytest.mark.parametrize(
    ("times", "expected"),
    [({"fps": 2}, [0.0, 0.5, 1.0]), ({"seconds": (0.25, 1, 7)}, [0.25, 1.0, 7.0])],
    ids=["fps", "seconds"],
)
def test_frames_and_their_times(times: dict[str, Any], expected: list[float]) -> None:
    message = to_video(Video([b"one", b"two", Image(digest="ab" * 32)], **times))
    assert [frame.seconds for frame in message.frames] == expected
    assert [frame.image.data or frame.image.digest for frame in message.frames] == [b"one", b"two", "ab" * 32]


@pytest.mark.parametrize(
    ("times", "complaint"),
    [
        ({}, "either fps"),
        ({"fps": 1, "seconds": [0, 1]}, "either fps"),
        ({"fps": 0}, "fps is 0; give"),
        ({"fps": float("nan")}, "fps is nan; give"),
        ({"seconds": [0]}, "2 frames and 1 seconds"),
    ],
)
def test_times_that_cannot_be(times: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Video([b"one", b"two"], **times)


@pytest.mark.parametrize("film", ["film.mp4", b"a film"])
def test_a_film_is_not_split(film: Any) -> None:
    with pytest.raises(TypeError, match="split into frames"):
        Video(film, fps=1)


def test_a_frame_that_is_no_picture() -> None:
    with pytest.raises(TypeError, match="expected a path, bytes"):
        to_video(Video([b"one", 2], fps=1))
