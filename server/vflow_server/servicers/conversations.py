"""The contract's ``Conversations`` service: sessions and their turns."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import grpc
from google.protobuf import empty_pb2
from structlog.contextvars import bind_contextvars

from vflow_client.v1 import conversations_pb2, conversations_pb2_grpc, images_pb2
from vflow_server.access.caller import current_caller
from vflow_server.images.pixel_bound import PixelBound
from vflow_server.images.store import PictureStore
from vflow_server.images.video_reader import VideoReader
from vflow_server.rpc.answer_writer import AnswerWriter
from vflow_server.rpc.intake import let_go_of_request, reading_request
from vflow_server.rpc.names import check_name
from vflow_server.rpc.paging import Pager
from vflow_server.servicers.chat_request import check_request_id, fingerprint, fingerprint_of, read_turn
from vflow_server.servicers.quotas import Quotas
from vflow_server.sessions.session import Session
from vflow_server.sessions.sessions import SessionStore
from vflow_server.strategies.strategies import StrategyStore
from vflow_server.telemetry.receipt_log import ReceiptLog
from vflowopt.media.video import Visual

Context = grpc.aio.ServicerContext[Any, Any]


class Conversations(conversations_pb2_grpc.ConversationsServicer):
    """Serves the sessions.

    Args:
        sessions: the sessions that exist.
        strategies: the strategies that a new session may have.
        pictures: decodes the pictures of requests.
        videos: decodes their videos.
        receipt_log: logs the receipts.
        quotas: the quotas of the tenants.
    """

    def __init__(
        self,
        sessions: SessionStore,
        strategies: StrategyStore,
        pictures: PictureStore,
        videos: VideoReader,
        receipt_log: ReceiptLog,
        quotas: Quotas,
    ) -> None:
        self._sessions = sessions
        self._strategies = strategies
        self._pictures = pictures
        self._videos = videos
        self._receipt_log = receipt_log
        self._quotas = quotas
        self._pager = Pager()

    async def CreateSession(
        self, request: conversations_pb2.CreateSessionRequest, context: Context
    ) -> conversations_pb2.Session:
        """Create a session."""
        strategy = request.session.strategy
        if strategy:
            check_name(strategy, "strategies", "session.strategy")
        self._quotas.check_session(current_caller().tenant)
        return self._message(await self._sessions.create(current_caller().tenant, self._strategies.get(strategy)))

    async def GetSession(
        self, request: conversations_pb2.GetSessionRequest, context: Context
    ) -> conversations_pb2.Session:
        """Read a session."""
        return self._message(self._find(request.name, "name"))

    async def ListSessions(
        self, request: conversations_pb2.ListSessionsRequest, context: Context
    ) -> conversations_pb2.ListSessionsResponse:
        """List the tenant's sessions, oldest first."""
        page, token = self._pager.page(
            self._sessions.of(current_caller().tenant),
            lambda session: session.number,
            request.page_size,
            request.page_token,
        )
        return conversations_pb2.ListSessionsResponse(sessions=map(self._message, page), next_page_token=token)

    async def ForkSession(
        self, request: conversations_pb2.ForkSessionRequest, context: Context
    ) -> conversations_pb2.Session:
        """Create a second session with the same state."""
        origin = self._find(request.name, "name")
        tenant = origin.tenant
        self._quotas.check_session(tenant)
        admit = partial(self._quotas.check_pictures, tenant)
        with origin.call():
            return self._message(await self._sessions.fork(origin, admit=admit))

    async def DeleteSession(self, request: conversations_pb2.DeleteSessionRequest, context: Context) -> empty_pb2.Empty:
        """Delete a session and release its memory."""
        await self._sessions.delete(self._find(request.name, "name"))
        return empty_pb2.Empty()

    async def AddImage(
        self, request: conversations_pb2.AddImageRequest, context: Context
    ) -> conversations_pb2.AddImageResponse:
        """Add a picture before its question."""
        session = self._find(request.session, "session")
        check_request_id(request.request_id)
        request_id = request.request_id
        with session.call():
            picture = await self._pictures.acquire(request.image, "image", session.tenant)
            del request
            return conversations_pb2.AddImageResponse(receipt=await self._show(picture, session, request_id))

    async def AddVideo(
        self, request: conversations_pb2.AddVideoRequest, context: Context
    ) -> conversations_pb2.AddVideoResponse:
        """Add a video before its question."""
        session = self._find(request.session, "session")
        check_request_id(request.request_id)
        request_id = request.request_id
        self._videos.check({"video": request.video})
        pixels = PixelBound(self._pictures.limits, "scale them down, or send fewer")
        with session.call():
            video = await self._videos.read(request.video, "video", session.tenant, pixels)
            del request
            return conversations_pb2.AddVideoResponse(receipt=await self._show(video, session, request_id))

    async def _show(self, visual: Visual, session: Session, request_id: str) -> images_pb2.ImageReceipt:
        let_go_of_request()
        receipt, repeated = await session.show(
            visual,
            request_id=request_id,
            fingerprint=fingerprint_of(visual),
            admit=lambda: self._quotas.check_pictures(session.tenant, 1),
        )
        if not repeated:
            self._receipt_log.picture(session.tenant, receipt)
        return receipt

    async def Chat(  # type: ignore[override]  # the stubs only know handlers that yield
        self, request: conversations_pb2.ChatRequest, context: Context
    ) -> None:
        """Run a turn and stream the answer.

        This writes to the context instead of yielding. When the client is gone, gRPC cancels this coroutine wherever it
        waits; a suspended generator it may leave to the garbage collector, with the turn still running.
        """
        accepted = time.perf_counter()
        session = self._find(request.session, "session")
        request_id = request.request_id
        with session.call():
            turn = await read_turn(request, self._pictures, self._videos, session.tenant)
            del request  # it is in memory as long as something refers to it
            with reading_request():
                digest = fingerprint(turn) if request_id else ""
            let_go_of_request()
            answer = await session.answer(
                turn,
                accepted=accepted,
                request_id=request_id,
                fingerprint=digest,
                admit=partial(self._quotas.check_pictures, session.tenant),
            )
        with AnswerWriter(context) as writer:
            if isinstance(answer, conversations_pb2.Finished):
                if answer.text:
                    await writer.write(_delta(answer.text))
                await writer.write(conversations_pb2.ChatResponse(finished=answer))
                return
            try:
                await writer.begin()  # while the engine works
                while texts := await answer.next_events():
                    await writer.write(_delta("".join(texts)))
                finished = await session.outcome(answer)
                self._receipt_log.turn(session.tenant, session.name, finished)
                await writer.write(conversations_pb2.ChatResponse(finished=finished))
            finally:
                answer.cancel()

    def _find(self, name: str, field: str) -> Session:
        bind_contextvars(session=check_name(name, "sessions", field))
        return self._sessions.get(current_caller().tenant, name)

    def _message(self, session: Session) -> conversations_pb2.Session:
        snapshot = session.state.snapshot
        message = conversations_pb2.Session(
            name=session.name,
            strategy=session.revision.name,
            turn_count=snapshot.turns,
            image_count=snapshot.images,
            kv_bytes=snapshot.kv_bytes,
            kv_bytes_full=snapshot.kv_bytes_full,
            resident=snapshot.resident,
        )
        message.create_time.FromNanoseconds(int(session.created * 1e9))
        message.last_used_time.FromNanoseconds(int(session.used * 1e9))
        if session.goes_on:
            message.expire_time.FromNanoseconds(int((session.idle_from + self._sessions.idle_timeout) * 1e9))
        return message


def _delta(text: str) -> conversations_pb2.ChatResponse:
    return conversations_pb2.ChatResponse(delta=conversations_pb2.TextDelta(text=text))
