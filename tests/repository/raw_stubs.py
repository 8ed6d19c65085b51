"""A caller of the generated stubs, blocking and with asyncio, as mypy sees it: test_contract.py has it checked."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterator

import grpc
import grpc.aio

from vflow_client.v1.compression_pb2 import CompressImageRequest
from vflow_client.v1.compression_pb2_grpc import CompressionStub
from vflow_client.v1.conversations_pb2 import (
    AddImageRequest,
    ChatOptions,
    ChatRequest,
    ChatResponse,
    CreateSessionRequest,
    Finished,
    ForkSessionRequest,
    Part,
    Session,
)
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.errors_pb2 import SESSION_BUSY, ErrorReason
from vflow_client.v1.images_pb2 import Image, ImageReceipt
from vflow_client.v1.strategies_pb2 import ListStrategiesRequest, Strategy
from vflow_client.v1.strategies_pb2_grpc import StrategiesStub


def ask(channel: grpc.Channel, picture: bytes) -> tuple[str, Finished.FinishReason.ValueType]:
    stub = ConversationsStub(channel)
    session: Session = stub.CreateSession(CreateSessionRequest(session=Session(strategy="strategies/full")))
    image = Image(data=picture, detail=Image.HIGH)
    receipt: ImageReceipt = stub.AddImage(AddImageRequest(session=session.name, image=image)).receipt
    kept: int = receipt.kept_tokens[0]
    request = ChatRequest(session=session.name, parts=[Part(text="Why?")], options=ChatOptions(max_new_tokens=kept))
    events: Iterator[ChatResponse] = stub.Chat(request, timeout=10.0, metadata=(("vflow-tenant", "acme"),))
    for event in events:
        if event.WhichOneof("event") == "finished":
            return event.finished.text, event.finished.finish_reason
    return "", Finished.STOP


async def ask_with_asyncio(channel: grpc.aio.Channel, session: Session) -> str:
    stub = ConversationsStub(channel)
    same: Session = await stub.ForkSession(ForkSessionRequest(name=session.name))
    events: AsyncIterable[ChatResponse] = stub.Chat(ChatRequest(session=same.name, parts=[Part(text="Why?")]))
    return "".join([event.delta.text async for event in events])


def importance(channel: grpc.Channel, picture: bytes) -> list[float]:
    response = CompressionStub(channel).CompressImage(CompressImageRequest(image=Image(data=picture)))
    return list(response.tokens.importance)


def strategies(channel: grpc.Channel) -> list[Strategy]:
    return list(StrategiesStub(channel).ListStrategies(ListStrategiesRequest(page_size=1000)).strategies)


def is_busy(reason: str) -> bool:
    return ErrorReason.Value(reason) == SESSION_BUSY
