"""A session, for asyncio."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vflow_client.aio.answer import AsyncAnswer
from vflow_client.aio.caller import AsyncCaller
from vflow_client.chat_request import PartSource, chat_request, new_request_id
from vflow_client.errors import SessionNotFound, VFlowError
from vflow_client.image_source import Detail, ImageSource, ImageSources, to_image
from vflow_client.session import FAREWELL
from vflow_client.v1.conversations_pb2 import (
    AddImageRequest,
    AddImageResponse,
    AddVideoRequest,
    AddVideoResponse,
    DeleteSessionRequest,
    ForkSessionRequest,
    GetSessionRequest,
)
from vflow_client.v1.conversations_pb2 import Session as SessionState
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.images_pb2 import ImageReceipt
from vflow_client.video_source import Video, to_video


class AsyncSession:
    """A conversation in the service. Leaving it as an async context manager deletes it there."""

    def __init__(self, name: str, stub: ConversationsStub, caller: AsyncCaller) -> None:
        """For `AsyncClient.session()` and `AsyncClient.attach()`."""
        self.name = name
        self._stub = stub
        self._caller = caller

    async def add_image(
        self, image: ImageSource, *, detail: Detail = "auto", timeout: float | None = None
    ) -> ImageReceipt:
        """Adds a picture before any question about it, so that the first answer comes sooner.

        It has a random request_id, so the picture is added once however often the request is sent.

        Args:
            image: a path, the bytes of a picture file, a PIL image, or `Image(digest=...)`.
            detail: how closely the model looks at it: "low" costs fewer tokens.
            timeout: seconds; None: the client's.

        Returns:
            The receipt: what the picture cost, and what its compression saved.

        Raises:
            PictureRejected: the service cannot use the picture.
            SessionBusy: a turn of this session is running.
            VFlowError: any other failure.
        """
        message = await asyncio.to_thread(to_image, image, detail)
        request = AddImageRequest(session=self.name, image=message, request_id=new_request_id())
        response: AddImageResponse = await self._caller.unary(self._stub.AddImage, request, timeout, repeatable=True)
        return response.receipt

    async def add_video(
        self,
        frames: Sequence[ImageSource],
        *,
        fps: float | None = None,
        seconds: Sequence[float] | None = None,
        timeout: float | None = None,
    ) -> ImageReceipt:
        """Adds a video before any question about it; the model of the service must support videos.

        It has a random request_id, so the video is added once however often the request is sent.

        Args:
            frames: of the clip, in order: pictures of one size, in any form that `add_image` accepts.
            fps: frames per second; or
            seconds: the time of each frame from the beginning of the clip, each later than the one before.
            timeout: seconds; None: the client's.

        Returns:
            The receipt: what the video cost, and what its compression saved, with the tokens of each frame.

        Raises:
            TypeError, ValueError: the frames or their times are not given as described above.
            PictureRejected: the service cannot use a frame.
            VideoRejected: the service cannot use the frames as a video.
            VideoUnsupported: the model of the service does not support videos.
            SessionBusy: a turn of this session is running.
            VFlowError: any other failure.
        """
        video = await asyncio.to_thread(to_video, Video(frames, fps, seconds))
        request = AddVideoRequest(session=self.name, video=video, request_id=new_request_id())
        response: AddVideoResponse = await self._caller.unary(self._stub.AddVideo, request, timeout, repeatable=True)
        return response.receipt

    async def ask(
        self,
        *parts: PartSource,
        images: ImageSources = (),
        detail: Detail = "auto",
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        timeout: float | None = None,
    ) -> AsyncAnswer:
        """Sends one turn and returns its answer, to be iterated over while it streams.

        Args:
            parts: the turn in order: a `str` is text, a `Video` a video, anything else a picture (a path as
                `pathlib.Path`).
            images: a picture, or several, before the parts; here a `str` is a path.
            detail: how closely the model looks at the turn's pictures; `Image(..., detail=Image.LOW)` sets it for one.
            max_new_tokens: tokens to generate at most.
            min_new_tokens: the answer does not end before it has this many tokens.
            temperature: 0 for greedy; None: the service's default, which is greedy.
            top_p: sample from the most probable tokens that together have this probability.
            seed: the same seed on the same conversation gives the same answer.
            stop: the answer ends before the first of these texts.
            timeout: seconds for the whole turn; None: the client's.

        A turn has a random request_id, so it counts once however often it is sent. Reading the answer raises failures.
        """
        request = await asyncio.to_thread(
            chat_request,
            self.name,
            parts,
            images=images,
            detail=detail,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        return AsyncAnswer(
            self._caller.streaming(self._stub.Chat), request, self._caller.attempts(timeout, repeatable=True)
        )

    async def fork(self, *, timeout: float | None = None) -> "AsyncSession":
        """Opens a second session with the same history. Later turns of one session do not affect the other.

        Raises:
            SessionBusy: a turn of this session is running.
            CapacityExhausted: the service has as many sessions as it can hold.
        """
        request = ForkSessionRequest(name=self.name)
        # Repeatable: a session whose name was lost with its response expires.
        state: SessionState = await self._caller.unary(self._stub.ForkSession, request, timeout, repeatable=True)
        return AsyncSession(state.name, self._stub, self._caller)

    async def state(self, *, timeout: float | None = None) -> SessionState:
        """Reads the state of the session: turns, pictures, KV bytes, time of expiry."""
        request = GetSessionRequest(name=self.name)
        state: SessionState = await self._caller.unary(self._stub.GetSession, request, timeout, repeatable=True)
        return state

    async def delete(self, *, timeout: float | None = None) -> None:
        """Deletes the session in the service. No error if it is gone already."""
        try:
            await self._caller.unary(
                self._stub.DeleteSession, DeleteSessionRequest(name=self.name), timeout, repeatable=True
            )
        except SessionNotFound:
            pass  # Expired, or deleted by an attempt whose response was lost.

    async def __aenter__(self) -> Self:
        """The session itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deletes the session. After an error it tries that only for a moment, and does not hide the error."""
        try:
            # After a failure it may not be possible, and it does not matter much: the session expires.
            await self.delete(timeout=None if error is None else FAREWELL)
        except VFlowError:
            if error is None:
                raise
