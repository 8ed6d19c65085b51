"""Values at the bounds of their types, in every field of every request: taken, or refused for a fault of the caller."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2 as operations
from google.longrunning.operations_pb2_grpc import OperationsStub
from google.protobuf import duration_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.server.drawing import png
from tests.server.fuzz import METHODS
from tests.server.served import Served
from vflow_client.v1 import compression_pb2, strategies_pb2
from vflow_client.v1 import conversations_pb2 as chat
from vflow_client.v1.errors_pb2 import ErrorReason
from vflow_client.v1.images_pb2 import Frame, Image, Video
from vflow_server.access.caller import DEFAULT_TENANT

PICTURE = Image(data=png(40, 50))
CALIBRATION = strategies_pb2.Calibration(
    samples=strategies_pb2.CalibrationSamples(
        samples=[strategies_pb2.CalibrationSample(image=PICTURE, questions=["What?"])]
    )
)

VALUES: Mapping[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), -1, 1, 99, 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), -1, 0, 1, 10**9, 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), -315_576_000_001, -1, 0, 1, 315_576_000_001, 2**53 + 1, 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: (
        *(float("nan"), float("inf"), -float("inf"), 1.7e308, -1.7e308, 1e16, 1e9, -0.0, 5e-324, 1e-308, -1e-9, 1.0),
        *(1.0 - 2**-53, 1.0 + 2**-52),
    ),
    FieldDescriptor.CPPTYPE_STRING: ("", " ", "\0", "\U0010ffff", "x" * 100_001, "operations/", "a/b/c"),
}


def requests(session: str, operation: str) -> dict[str, Message]:
    """A valid request to every method, with a value in every field that may matter."""
    strategy = strategies_pb2.Strategy(
        budget=0.1, starts=[0, 1], ratios=[0.2], threshold=1.0, alpha=0.1, grid=4.0, diversity=0.1
    )
    options = chat.ChatOptions(max_new_tokens=2, min_new_tokens=1, temperature=1.0, top_p=0.9, seed=1, stop=["zz"])
    video = Video(frames=[Frame(image=PICTURE, seconds=number / 2) for number in range(2)])
    parts = [chat.Part(text="What?"), chat.Part(image=PICTURE), chat.Part(video=video)]
    name = "strategies/preset-10"
    return {
        "CreateSession": chat.CreateSessionRequest(session=chat.Session(strategy=name)),
        "GetSession": chat.GetSessionRequest(name=session),
        "ListSessions": chat.ListSessionsRequest(page_size=2, page_token="x"),
        "ForkSession": chat.ForkSessionRequest(name=session),
        "DeleteSession": chat.DeleteSessionRequest(name="sessions/nobody"),
        "AddImage": chat.AddImageRequest(session=session, image=PICTURE),
        "AddVideo": chat.AddVideoRequest(session=session, video=video),
        "Chat": chat.ChatRequest(session=session, parts=parts, options=options, request_id="one"),
        "CompressImage": compression_pb2.CompressImageRequest(image=PICTURE, strategy=name, include_embeddings=True),
        "ListStrategies": strategies_pb2.ListStrategiesRequest(page_size=2, page_token="x"),
        "GetStrategy": strategies_pb2.GetStrategyRequest(name=name),
        "CreateStrategy": strategies_pb2.CreateStrategyRequest(strategy_id="one", strategy=strategy),
        "ActivateStrategy": strategies_pb2.ActivateStrategyRequest(name=name, etag="x"),
        "RollbackStrategy": strategies_pb2.RollbackStrategyRequest(etag="x"),
        # No search is begun: the base is not there.
        "Retune": strategies_pb2.RetuneRequest(
            budget=0.1, trials=1, seed=1, base="strategies/none", strategy_id="two", calibration=CALIBRATION
        ),
        "CompareStrategies": strategies_pb2.CompareStrategiesRequest(names=[name, name], calibration=CALIBRATION),
        "GetOperation": operations.GetOperationRequest(name=operation),
        "ListOperations": operations.ListOperationsRequest(name="operations", page_size=2, page_token="x"),
        "DeleteOperation": operations.DeleteOperationRequest(name="operations/none"),
        "CancelOperation": operations.CancelOperationRequest(name=operation),
        "WaitOperation": operations.WaitOperationRequest(
            name=operation, timeout=duration_pb2.Duration(seconds=0, nanos=1)
        ),
    }


def places(message: Message, path: str = "") -> Iterator[tuple[str, Callable[[Message], Message], FieldDescriptor]]:
    """Every number, text and choice in a message and in those in it: its path, how to get to its message, its field."""
    for field in message.DESCRIPTOR.fields:
        here = f"{path}.{field.name}"
        if field.message_type is None:
            if field.type != FieldDescriptor.TYPE_BYTES:
                yield here, lambda whole: whole, field
        elif field.is_repeated:
            for index in range(len(getattr(message, field.name))):
                inner = getattr(message, field.name)[index]
                for found, get, scalar in places(inner, f"{here}[{index}]"):
                    yield found, _within(get, field.name, index), scalar
        elif message.HasField(field.name):
            for found, get, scalar in places(getattr(message, field.name), here):
                yield found, _within(get, field.name), scalar


def _within(get: Callable[[Message], Message], name: str, index: int | None = None) -> Callable[[Message], Message]:
    def inner(whole: Message) -> Message:
        part = getattr(whole, name)
        return get(part if index is None else part[index])

    return inner


def variants(request: Message) -> Iterator[tuple[str, Message]]:
    """The request with one field at a time at the bounds of its type."""
    for path, get, field in places(request):
        for value in VALUES[field.cpp_type]:
            changed = type(request)()
            changed.CopyFrom(request)
            inner = get(changed)
            if field.is_repeated:
                getattr(inner, field.name).append(value)
            else:
                setattr(inner, field.name, value)
            yield f"{path} = {str(value)[:20]!r}", changed


@pytest.fixture(scope="module")
def served(runtime: Any) -> Iterator[Served]:
    served = Served(runtime)
    yield served
    served.stop()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_no_value_is_a_fault_of_the_service(served: Served, method: Any) -> None:
    channel = served.client._channel

    async def ended() -> str:
        store = served.service.operations
        operation = store.begin(DEFAULT_TENANT, strategies_pb2.RetuneMetadata(), lambda: None)
        await store.end(operation, strategies_pb2.RetuneResponse())
        return operation.name

    operation = served.run(ended())
    with served.client.session() as session:
        request = requests(session.name, operation)[method.name]
        assert type(request).DESCRIPTOR is GetMessageClass(method.input_type).DESCRIPTOR
        path = f"/{method.containing_service.full_name}/{method.name}"
        answer = GetMessageClass(method.output_type).FromString
        for what, changed in itertools.chain([("as it is", request)], variants(request)):
            message = changed.SerializeToString()
            try:
                if method.server_streaming:
                    list(channel.unary_stream(path, response_deserializer=answer)(message, timeout=20))
                else:
                    channel.unary_unary(path, response_deserializer=answer)(message, timeout=20)
            except grpc.RpcError as error:
                assert _reason(error) not in ("INTERNAL", "ENGINE_FAILED"), f"{what}: {error.details()}"
        for each in list(served.service.sessions):
            if each.name != session.name:
                served.run(served.service.sessions.delete(each))


def _reason(error: grpc.RpcError) -> str:
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details), error
    assert info.reason in ErrorReason.keys(), error
    return info.reason


@pytest.mark.parametrize(
    "timeout",
    [(-1, 0), (0, -1), (0, 10**9), (315_576_000_001, 0), (2**63 - 1, 0), (-(2**63), 0), (1, -(2**31))],
)
def test_a_timeout_that_is_none_is_refused_by_its_field(served: Served, timeout: tuple[int, int]) -> None:

    request = operations.WaitOperationRequest(name="operations/none")
    request.timeout.seconds, request.timeout.nanos = timeout
    with pytest.raises(grpc.RpcError) as refused:
        OperationsStub(served.client._channel).WaitOperation(request, timeout=20)
    status = rpc_status.from_call(refused.value)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert status is not None and _reason(refused.value) == "OPTION_OUT_OF_RANGE"
    assert any(b"timeout" in detail.value for detail in status.details)


def _within_field(message: type[Message], path: str, content: bytes) -> bytes:
    """``content`` as the bytes of a field, several messages down, whose path begins in ``message``."""
    name, _, rest = path.partition(".")
    field = message.DESCRIPTOR.fields_by_name[name]
    if rest:
        assert field.message_type is not None
        content = _within_field(GetMessageClass(field.message_type), rest, content)
    size, length = bytearray(), len(content)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([field.number << 3 | 2, *size, length]) + content


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/vflow.v1.Conversations/Chat", _within_field(chat.ChatRequest, "parts", b"") * 100_000),
        ("/vflow.v1.Conversations/Chat", b"\x78\x01" * 100_000),  # fields that nobody knows
        (
            "/vflow.v1.Conversations/AddVideo",
            _within_field(chat.AddVideoRequest, "video", _within_field(Video, "frames", b"") * 100_000),
        ),
        (
            "/vflow.v1.Strategies/CreateStrategy",
            _within_field(strategies_pb2.CreateStrategyRequest, "strategy.starts", b"\1" * 100_000),
        ),
    ],
    ids=["parts", "unknown", "frames", "numbers"],
)
def test_a_message_of_countless_fields_is_refused_before_it_is_parsed(
    served: Served, path: str, message: bytes
) -> None:
    with pytest.raises(grpc.RpcError, match="fields") as refused:
        served.client._channel.unary_unary(path)(message, timeout=20)
    assert _reason(refused.value) == "MESSAGE_INVALID"
