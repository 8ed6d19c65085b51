"""Writes answers to callers who may not read them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import Self

import grpc
from google.protobuf.message import Message

from vflow_server.rpc.errors import ServiceError, reader_stalled
from vflow_server.rpc.handlers import Context

SLOWEST_READER = 60.0
"""Seconds that a part of an answer may wait for a caller that does not read, once its flow-control window is full."""


class AnswerWriter:
    """Writes the answer of one call, within that call's task. A context manager.

    Args:
        context: the call.
        patience: seconds that a part may wait for the caller; None: :data:`SLOWEST_READER`.
    """

    def __init__(self, context: Context, patience: float | None = None) -> None:
        self._context = context
        self._patience = SLOWEST_READER if patience is None else patience
        self._begun = False
        self._task = asyncio.current_task()
        self._sending_since: float | None = None
        self._look: asyncio.TimerHandle | None = None
        self._stalled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._look is not None:
            self._look.cancel()

    async def begin(self) -> None:
        """Tell the caller that an answer follows. :meth:`write` does so if it has not been done.

        gRPC would do it with the first part. While that waits for the caller, no status could be sent.

        Raises:
            ServiceError: READER_STALLED.
        """
        self._begun = True
        await self._within_patience(self._context.send_initial_metadata(()))

    async def write(self, message: Message) -> None:
        """Send a part of the answer.

        Raises:
            ServiceError: READER_STALLED.
        """
        if not self._begun:
            await self.begin()
        await self._within_patience(self._context.write(message))

    async def _within_patience(self, sending: Awaitable[None]) -> None:
        loop = asyncio.get_running_loop()
        self._sending_since = loop.time()
        if self._look is None:
            self._look = loop.call_later(self._patience, self._look_for_stall)
        try:
            await sending
        except asyncio.CancelledError:
            if self._stalled and self._task is not None and not self._task.uncancel():
                raise reader_stalled(self._patience) from None
            raise
        except grpc.aio.InternalError:  # the connection broke, and gRPC has not cancelled the call yet
            raise asyncio.CancelledError from None
        finally:
            self._sending_since = None

    def _look_for_stall(self) -> None:
        """End the call if what is being sent has waited for too long.

        One timer serves all parts of an answer: it looks again when the part that is being sent then may have waited
        for too long. One for each part would cost a third of what it costs to send it.
        """
        self._look = None
        if self._sending_since is None:
            return
        loop = asyncio.get_running_loop()
        if (left := self._sending_since + self._patience - loop.time()) > 0:
            self._look = loop.call_later(left, self._look_for_stall)
        elif self._task is not None:
            self._stalled = True
            self._task.cancel()

    async def write_all(self, message: Message, counted: ExitStack) -> None:
        """Send a whole answer.

        Args:
            message: the answer.
            counted: what the call counts for. If the caller does not read, gRPC holds the answer as long as the
                connection lives; then this is closed only when gRPC lets go of it.

        Raises:
            ServiceError: READER_STALLED.
        """
        try:
            await self._context.send_initial_metadata(())
        except grpc.aio.InternalError:  # as in write
            raise asyncio.CancelledError from None
        writing = asyncio.create_task(self._context.write(message))
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await self._within_patience(asyncio.shield(writing))
        except ServiceError:
            unread = counted.pop_all()
            writing.add_done_callback(lambda _: unread.close())
            raise
