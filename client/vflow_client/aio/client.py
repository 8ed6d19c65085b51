"""The asyncio client."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import grpc

from vflow_client.aio.caller import AsyncCaller
from vflow_client.aio.session import AsyncSession
from vflow_client.aio.strategy_admin import AsyncStrategyAdmin
from vflow_client.channel import channel_plan
from vflow_client.errors import Unavailable
from vflow_client.identity import identity_metadata
from vflow_client.image_source import Detail, ImageSource, to_image
from vflow_client.names import strategy_name
from vflow_client.peer import Peer
from vflow_client.retry import DEFAULT_TIMEOUT, RetryPolicy
from vflow_client.tls import TlsSource
from vflow_client.v1.compression_pb2 import CompressImageRequest, CompressImageResponse
from vflow_client.v1.compression_pb2_grpc import CompressionStub
from vflow_client.v1.conversations_pb2 import CreateSessionRequest, ListSessionsRequest, ListSessionsResponse
from vflow_client.v1.conversations_pb2 import Session as SessionState
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub


class AsyncClient:
    """A connection to a VFlow service. Belongs to one event loop; close it, or use it as an async context manager.

    Attributes:
        strategies: the administration of strategies.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        retry: RetryPolicy | None = None,
        token: str | None = None,
        tenant: str | None = None,
        peer: Peer | None = None,
    ) -> None:
        """Uses `channel`, which `close()` closes; `connect()` makes one from an address.

        Args:
            channel: a channel to the service.
            timeout: seconds that each call may take, its retries included; None: no limit.
            retry: when failed calls are tried again; None: the defaults of `RetryPolicy`.
            token: authenticates the caller, where the service requires it.
            tenant: the tenant of these calls; None: the tenant of the token or, without a token, the service's default.
            peer: what messages to people say about the service.

        Raises:
            ValueError: `token` or `tenant` has characters that cannot be sent.
        """
        self._channel = channel
        self._caller = AsyncCaller(timeout, retry or RetryPolicy(), token=token, tenant=tenant, peer=peer)
        self._conversations = ConversationsStub(channel)
        self._compression = CompressionStub(channel)
        self.strategies = AsyncStrategyAdmin(channel, self._caller)

    async def session(self, strategy: str | None = None, *, timeout: float | None = None) -> AsyncSession:
        """Opens a session; `strategy` (None: the active one) compresses its pictures for as long as it lives.

        Raises:
            StrategyNotFound: there is no such strategy.
            CapacityExhausted: the service has as many sessions as it can hold.
        """
        request = CreateSessionRequest(session=SessionState(strategy=strategy_name(strategy)))
        # Repeatable: a session whose name was lost with its response expires.
        state: SessionState = await self._caller.unary(
            self._conversations.CreateSession, request, timeout, repeatable=True
        )
        return self.attach(state.name)

    def attach(self, name: str) -> AsyncSession:
        """An existing session, by its resource name `sessions/{session}`. Makes no call."""
        return AsyncSession(name, self._conversations, self._caller)

    async def sessions(self, *, timeout: float | None = None) -> AsyncIterator[SessionState]:
        """Yields the sessions of the tenant, oldest first, page by page; `timeout` is for each page."""
        request = ListSessionsRequest()
        while True:
            page: ListSessionsResponse = await self._caller.unary(
                self._conversations.ListSessions, request, timeout, repeatable=True
            )
            for state in page.sessions:
                yield state
            if not page.next_page_token:
                return
            request = ListSessionsRequest(page_token=page.next_page_token)

    async def compress(
        self,
        image: ImageSource,
        *,
        strategy: str | None = None,
        embeddings: bool = False,
        detail: Detail = "auto",
        timeout: float | None = None,
    ) -> CompressImageResponse:
        """Compresses a picture without any session, for use with another engine.

        Args:
            image: a path, the bytes of a picture file, a PIL image, or `Image(digest=...)`.
            strategy: None: the active one.
            embeddings: whether to return the embeddings of the kept tokens, as the bytes of a safetensors file.
            detail: how closely the model looks at the picture.
            timeout: seconds; None: the client's.

        Raises:
            PictureRejected: the service cannot use the picture.
            StrategyNotFound: there is no such strategy.
        """
        request = CompressImageRequest(
            image=await asyncio.to_thread(to_image, image, detail),
            strategy=strategy_name(strategy),
            include_embeddings=embeddings,
        )
        response: CompressImageResponse = await self._caller.unary(
            self._compression.CompressImage, request, timeout, repeatable=True
        )
        return response

    async def wait_until_reachable(self, timeout: float) -> None:
        """Waits until the service accepts connections; raises Unavailable if `timeout` seconds pass first."""
        try:
            async with asyncio.timeout(timeout):
                await self._channel.channel_ready()
        except TimeoutError:
            raise Unavailable(
                f"the service could not be reached within {timeout:g} s", code=grpc.StatusCode.UNAVAILABLE
            ) from None

    async def close(self) -> None:
        """Closes the connection; calls that still run are cancelled. Sessions stay in the service until they expire."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self.close()


def connect(
    address: str,
    *,
    timeout: float | None = DEFAULT_TIMEOUT,
    retry: RetryPolicy | None = None,
    token: str | None = None,
    tls: TlsSource = False,
    tenant: str | None = None,
) -> AsyncClient:
    """A client of the service at `address`, such as `"localhost:50051"`. The connection is made with the first call.

    Args:
        address: host and port (without one: 50051), a web address (`https://...` is encrypted), or any gRPC target
            (`dns:///...`, `unix:...`). `http_proxy` in the environment is heeded, but not for this machine.
        timeout: seconds that each call may take, its retries included; None: no limit.
        retry: when failed calls are tried again; None: the defaults of `RetryPolicy`.
        token: authenticates the caller, where the service requires it; white space around it is dropped. Without
            `tls` it can be read on the network.
        tls: whether to encrypt the connection, or how: the path of a file (PEM) with the roots of the service's
            certificate, or a `Tls`.
        tenant: the tenant whose sessions and pictures these calls can use, 1 to 63 lower-case letters, digits and
            hyphens; None: the tenant of the token or, without a token, the service's default.

    While the service cannot be reached, or stops, calls are tried again as `retry` says. After a second the logger
    `vflow_client` says so with a warning.

    Raises:
        OSError: a file of `tls` cannot be read.
        ValueError: `address` is none, or contradicts `tls`; or `token` or `tenant` has characters that cannot be sent.
    """
    plan = channel_plan(address, tls)
    identity_metadata(token, tenant)  # what cannot be sent is refused before there is a channel to close
    peer = Peer(address, encrypted=plan.credentials is not None)
    return AsyncClient(plan.aio_channel(), timeout=timeout, retry=retry, token=token, tenant=tenant, peer=peer)
