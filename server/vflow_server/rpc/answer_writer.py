"""Writes answers to callers who may not read them."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import grpc
from google.protobuf.message import Message

from vflow_server.rpc.errors import reader_stalled
from vflow_server.rpc.handlers import Context

SLOWEST_READER = 60.0
"""Seconds that a part of an answer may wait for a caller that does not read, once its flow-control window is full."""


class AnswerWriter:
    """Writes the answer of one call.

    Args:
        context: the call.
        patience: seconds that a part may wait for the caller; None: :data:`SLOWEST_READER`.
    """

    def __init__(self, context: Context, patience: float | None = None) -> None:
        self._context = context
        self._patience = SLOWEST_READER if patience is None else patience
        self._begun = False

    async def write(self, message: Message) -> None:
        """Send an answer, or a part of it.

        Raises:
            ServiceError: READER_STALLED.
        """
        try:
            async with asyncio.timeout(self._patience):
                if not self._begun:
                    # By itself, as gRPC would send it with the first part: while that waits, no status could be sent.
                    await self._context.send_initial_metadata(())
                    self._begun = True
                await self._context.write(message)
        except TimeoutError:
            raise reader_stalled(self._patience) from None
        except grpc.aio.InternalError:  # the connection broke, and gRPC has not cancelled the call yet
            raise asyncio.CancelledError from None

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
        await asyncio.wait({writing}, timeout=self._patience)
        if not writing.done():
            unread = counted.pop_all()
            writing.add_done_callback(lambda _: unread.close())
            raise reader_stalled(self._patience)
        if isinstance(writing.exception(), grpc.aio.InternalError):
            raise asyncio.CancelledError
        writing.result()
