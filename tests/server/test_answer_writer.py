"""Answers to callers who are gone."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from vflow_server.rpc.answer_writer import AnswerWriter

WRITES: list[Callable[[AnswerWriter], Coroutine[Any, Any, None]]] = [
    lambda writer: writer.write(Empty()),
    lambda writer: writer.write_all(Empty(), ExitStack()),
]


@pytest.mark.parametrize("write", WRITES, ids=["a part", "all"])
@pytest.mark.parametrize("broken", ["send_initial_metadata", "write"])
def test_a_call_whose_connection_broke_is_cancelled(
    broken: str, write: Callable[[AnswerWriter], Coroutine[Any, Any, None]]
) -> None:
    """It is no fault of the service, and no alarm."""

    class Broken:
        async def send_initial_metadata(self, metadata: object) -> None:
            self._fail("send_initial_metadata")

        async def write(self, message: object) -> None:
            self._fail("write")

        def _fail(self, step: str) -> None:
            if step == broken:
                raise grpc.aio.InternalError("the batch failed")

    context: Any = Broken()

    async def writing() -> None:
        await write(AnswerWriter(context))

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(writing())
