"""The videos that requests bring, checked and decoded."""

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
        pictures: decodes their frames, and holds those of videos that were taken in.
        model: may take no videos.
        most_frames: of the videos of one request together.
    """

    def __init__(self, pictures: PictureStore, model: MultimodalModel, *, most_frames: int) -> None:
        self._pictures = pictures
        self._model = model
        self._most_frames = most_frames

    def check(self, videos: Mapping[str, images_pb2.Video]) -> None:
        """Refuse what can be refused of the videos of one request, by their fields, before anything is decoded.

        Raises:
            ServiceError: VIDEO_UNSUPPORTED, VIDEO_TOO_LONG, or OPTION_OUT_OF_RANGE where a frame has a detail.
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
        """The video that ``video`` brings, which was checked, at ``field`` of a request of ``tenant``.

        Args:
            video: the message.
            field: where it came.
            tenant: whose it is.
            pixels: counts those of the frames.

        Raises:
            ServiceError: a frame is no picture, or they are no video together. None of them is held then.
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
