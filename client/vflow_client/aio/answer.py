"""An answer while it streams, for asyncio."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import grpc

from vflow_client.errors import AnswerChanged, error_from_call
from vflow_client.retry import Attempts
from vflow_client.transcript import Transcript
from vflow_client.v1.conversations_pb2 import ChatRequest, ChatResponse


class AsyncAnswer(Transcript, AsyncIterator[str]):
    """Iterating yields pieces of text as they arrive; after the last one, `usage` and `receipt` can be read.

    Closing an answer before its end (`close()`, or leaving it as an async context manager), or cancelling the task that
    reads it, cancels the turn and leaves the session as it was before the question. If the service, which may be ahead
    of the reader, has finished the turn already, it counts (see `AsyncSession.state()`). Only one task may
    read an answer.
    """

    def __init__(self, method: Any, request: ChatRequest, attempts: Attempts) -> None:
        """Sends `request` to the streaming `method` at once."""
        super().__init__()
        self._method = method
        self._request = request
        self._attempts = attempts
        self._send()

    async def __anext__(self) -> str:
        """The next piece of text, never empty.

        If the connection breaks, the turn is sent again under the same request_id, and the text that was read already
        is skipped.

        Raises:
            AnswerChanged: the connection broke, and the service answered anew in other words.
            VFlowError: the turn failed, and the session is as it was before.
        """
        while not self.finished:
            event = await self._next_event()
            try:
                piece = self._append(event)
            except AnswerChanged:
                self.close()
                raise
            if piece:
                self._attempts.progressed()
                return piece
        raise StopAsyncIteration

    async def read(self) -> str:
        """Reads the rest of the answer and returns all of its text."""
        async for _ in self:
            pass
        return self.text

    def close(self) -> None:
        """Cancels the turn if the answer is not finished yet. May be called more than once."""
        if not self.finished:
            self._closed = True
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self) -> None:
        self._call = self._method(self._request, timeout=self._attempts.remaining())
        self._events = aiter(self._call)

    async def _next_event(self) -> ChatResponse:
        while True:
            self._refuse_if_closed()
            try:
                event: ChatResponse = await anext(self._events)
            except StopAsyncIteration:
                raise self._incomplete() from None
            except grpc.RpcError as failure:
                self._refuse_if_closed()
                error = error_from_call(failure)
                delay = self._attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            except asyncio.CancelledError:
                # Another task may have closed the answer while this one was reading; otherwise this task is cancelled.
                self._refuse_if_closed()
                raise
            else:
                if event.HasField("finished"):
                    # Let the call end by itself, because dropping it would cancel it. The turn counts in any case.
                    await self._call.code()
                return event
            await asyncio.sleep(delay)
            self._refuse_if_closed()
            self._repeat()
            self._send()
