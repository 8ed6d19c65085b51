"""Checks and decodes the videos of requests."""

from __future__ import annotations

from collections.abc import Mapping

from vflow_client.v1 import images_pb2
from vflow_server.images.pixel_bound import PixelBound
from vflow_server.images.store import PictureStore
from vflow_server.rpc.errors import InvalidRequest, video_unsupported
from vflowopt.media.picture import Picture
from vflowopt.media.video import Video, VideoError, VideoLimits
from vflowopt.models.interface import MultimodalModel


class VideoReader:
    """Reads videos for one model.

    Args:
        pictures: decodes the frames, and holds those of valid videos.
        model: the model; it need not support videos.
        most_frames: number of frames of all videos of one request at most.
    """

    def __init__(self, pictures: PictureStore, model: MultimodalModel, *, most_frames: int) -> None:
        self._pictures = pictures
        self._model = model
        self._most_frames = most_frames

    def check(self, videos: Mapping[str, images_pb2.Video]) -> None:
        """Check the videos of one request, given by their paths, before anything is decoded.

        Raises:
            ServiceError: VIDEO_UNSUPPORTED, VIDEO_TOO_LONG, or OPTION_OUT_OF_RANGE if a frame has a detail.
        """
        if videos and self._model.video_mark is None:
            raise video_unsupported(self._model.family)
        frames = 0
        for field, video in videos.items():
            frames += len(video.frames)
            if frames > self._most_frames:
                raise InvalidRequest(
                    "VIDEO_TOO_LONG",
                    field,
                    f"with this video the request has {frames} frames, at most {self._most_frames} are accepted; "
                    "send fewer a second, or a shorter clip",
                    metadata={"frames": frames, "max_frames": self._most_frames},
                )
            for index, frame in enumerate(video.frames):
                if frame.image.detail:
                    raise InvalidRequest(
                        "OPTION_OUT_OF_RANGE",
                        f"{field}.frames[{index}].image.detail",
                        "a frame has no detail of its own: leave it out, a video is looked at as closely as the model "
                        "lets it",
                        metadata={"value": frame.image.detail},
                    )

    async def read(self, video: images_pb2.Video, field: str, tenant: str, pixels: PixelBound) -> Video:
        """Decode a video that was checked, and hold its frames.

        Args:
            video: the message.
            field: its path in the request.
            tenant: the tenant that sent it.
            pixels: counts the pixels of the frames.

        Raises:
            ServiceError: a frame is not a valid picture, or the frames are not a valid video. Then none is held.
        """
        frames: list[Picture] = []
        for index, frame in enumerate(video.frames):
            place = f"{field}.frames[{index}].image"
            frames.append(await self._pictures.read(frame.image, place, tenant))
            pixels.count(frames[-1], place)
        limits = VideoLimits(max_frames=self._most_frames, max_pixels=pixels.most)
        try:
            read = Video.of(frames, [frame.seconds for frame in video.frames], limits)
        except VideoError as error:
            raise InvalidRequest(error.reason, field, str(error), metadata=error.metadata) from error
        self._pictures.hold(tenant, frames)
        return read
