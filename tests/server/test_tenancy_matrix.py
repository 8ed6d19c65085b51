"""Every method of the contract, called by the tenant whose resources it names, by another tenant, and without a valid
token. A new method fails here until its expected outcomes are listed.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from tests.server.conftest import Serve
from tests.server.served import Served
from vflow_client import CapacityExhausted
from vflow_client.errors import error_from_call
from vflow_client.v1 import compression_pb2, conversations_pb2, images_pb2, strategies_pb2
from vflow_server.access.caller import Caller
from vflow_server.access.tokens import new_token
from vflow_server.rpc.errors import ServiceError
from vflow_server.rpc.intake import PROMPT_PLACES, Bounds, Intake
from vflow_server.tuning.operations import Operation

SERVICES: tuple[ServiceDescriptor, ...] = (
    conversations_pb2.DESCRIPTOR.services_by_name["Conversations"],
    compression_pb2.DESCRIPTOR.services_by_name["Compression"],
    strategies_pb2.DESCRIPTOR.services_by_name["Strategies"],
    operations_pb2.DESCRIPTOR.services_by_name["Operations"],
)
METHODS: Mapping[str, MethodDescriptor] = {method.full_name: method for each in SERVICES for method in each.methods}

ADMINISTRATION = ("vflow.v1.Strategies.", "google.longrunning.Operations.")
"""Prefixes of the methods that a user may not call."""


@dataclass(frozen=True)
class Things:
    """The resources of the tenant red."""

    session: str
    operation: str
    picture: images_pb2.Image


@dataclass(frozen=True)
class Case:
    """A method's request, and the outcomes for red itself and for another tenant."""

    request: Callable[[Things], Message]
    own: str = "OK"
    other: str = "OK"


HIDDEN_SESSION, HIDDEN_OPERATION = {"other": "SESSION_NOT_FOUND"}, {"other": "OPERATION_NOT_FOUND"}

CASES: Mapping[str, Case] = {
    "vflow.v1.Conversations.CreateSession": Case(lambda red: conversations_pb2.CreateSessionRequest()),
    "vflow.v1.Conversations.GetSession": Case(
        lambda red: conversations_pb2.GetSessionRequest(name=red.session), **HIDDEN_SESSION
    ),
    "vflow.v1.Conversations.ListSessions": Case(lambda red: conversations_pb2.ListSessionsRequest()),
    "vflow.v1.Conversations.ForkSession": Case(
        lambda red: conversations_pb2.ForkSessionRequest(name=red.session), **HIDDEN_SESSION
    ),
    "vflow.v1.Conversations.DeleteSession": Case(
        lambda red: conversations_pb2.DeleteSessionRequest(name=red.session), **HIDDEN_SESSION
    ),
    "vflow.v1.Conversations.AddImage": Case(
        lambda red: conversations_pb2.AddImageRequest(session=red.session, image=red.picture), **HIDDEN_SESSION
    ),
    "vflow.v1.Conversations.AddVideo": Case(
        lambda red: conversations_pb2.AddVideoRequest(
            session=red.session, video=images_pb2.Video(frames=[images_pb2.Frame(image=red.picture)])
        ),
        **HIDDEN_SESSION,
    ),
    "vflow.v1.Conversations.Chat": Case(
        lambda red: conversations_pb2.ChatRequest(
            session=red.session,
            parts=[conversations_pb2.Part(text="Hello?")],
            options=conversations_pb2.ChatOptions(max_new_tokens=1),
        ),
        **HIDDEN_SESSION,
    ),
    "vflow.v1.Compression.CompressImage": Case(
        lambda red: compression_pb2.CompressImageRequest(image=red.picture), other="PICTURE_NOT_HELD"
    ),
    # Strategies are everybody's; what these requests lack is complained of once the caller is let in.
    "vflow.v1.Strategies.ListStrategies": Case(lambda red: strategies_pb2.ListStrategiesRequest()),
    "vflow.v1.Strategies.GetStrategy": Case(lambda red: strategies_pb2.GetStrategyRequest(name="strategies/full")),
    "vflow.v1.Strategies.CreateStrategy": Case(
        lambda red: strategies_pb2.CreateStrategyRequest(), own="NAME_INVALID", other="NAME_INVALID"
    ),
    "vflow.v1.Strategies.ActivateStrategy": Case(
        lambda red: strategies_pb2.ActivateStrategyRequest(name="strategies/full")
    ),
    "vflow.v1.Strategies.RollbackStrategy": Case(
        lambda red: strategies_pb2.RollbackStrategyRequest(etag="-"), own="ETAG_MISMATCH", other="ETAG_MISMATCH"
    ),
    "vflow.v1.Strategies.Retune": Case(
        lambda red: strategies_pb2.RetuneRequest(), own="OPTION_OUT_OF_RANGE", other="OPTION_OUT_OF_RANGE"
    ),
    "vflow.v1.Strategies.CompareStrategies": Case(
        lambda red: strategies_pb2.CompareStrategiesRequest(
            names=["strategies/full", "strategies/preset-10"],
            calibration=strategies_pb2.Calibration(
                samples=strategies_pb2.CalibrationSamples(
                    samples=[strategies_pb2.CalibrationSample(image=red.picture, questions=["What?"])]
                )
            ),
        ),
        other="PICTURE_NOT_HELD",
    ),
    "google.longrunning.Operations.ListOperations": Case(lambda red: operations_pb2.ListOperationsRequest()),
    "google.longrunning.Operations.GetOperation": Case(
        lambda red: operations_pb2.GetOperationRequest(name=red.operation), **HIDDEN_OPERATION
    ),
    "google.longrunning.Operations.DeleteOperation": Case(
        lambda red: operations_pb2.DeleteOperationRequest(name=red.operation), **HIDDEN_OPERATION
    ),
    "google.longrunning.Operations.CancelOperation": Case(
        lambda red: operations_pb2.CancelOperationRequest(name=red.operation), **HIDDEN_OPERATION
    ),
    "google.longrunning.Operations.WaitOperation": Case(
        lambda red: operations_pb2.WaitOperationRequest(name=red.operation, timeout={"nanos": 1}), **HIDDEN_OPERATION
    ),
}

PAST = datetime.now(UTC) - timedelta(minutes=1)
TOKENS = {
    name: new_token(Caller(tenant, admin=admin), expires)
    for name, tenant, admin, expires in (
        ("red user", "red", False, None),
        ("red admin", "red", True, None),
        ("blue user", "blue", False, None),
        ("blue admin", "blue", True, None),
        ("expired", "red", True, PAST),
    )
}


def expected_outcome(caller: str, method: str) -> str:
    """The outcome when ``caller`` calls ``method`` with a resource of red's."""
    match caller:
        case "nobody":
            return "TOKEN_MISSING"
        case "unknown":
            return "TOKEN_INVALID"
        case "expired":
            return "TOKEN_EXPIRED"
        case "red for blue":
            return "TENANT_FORBIDDEN"
    tenant, role = caller.split()
    if role == "user" and method.startswith(ADMINISTRATION):
        return "ADMIN_REQUIRED"
    return CASES[method].own if tenant == "red" else CASES[method].other


def metadata_of(caller: str) -> list[tuple[str, str]]:
    match caller:
        case "nobody":
            return [("vflow-tenant", "red")]
        case "unknown":
            return [("authorization", "Bearer vflow_unknown"), ("vflow-tenant", "red")]
        case "red for blue":
            return [("authorization", f"Bearer {TOKENS['red admin'][0]}"), ("vflow-tenant", "blue")]
    return [("authorization", f"Bearer {TOKENS[caller][0]}")]


@pytest.fixture
def guarded(serve: Serve) -> Served:
    return serve(tokens="\n".join(entry.line() for _, entry in TOKENS.values()))


@pytest.fixture
def channel(guarded: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.address) as channel:
        yield channel


def call(channel: grpc.Channel, method: MethodDescriptor, request: Message, caller: str) -> tuple[str, list[Message]]:
    """Call ``method`` as ``caller``: "OK" or the reason why not, and what came back."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    build = channel.unary_stream if method.server_streaming else channel.unary_unary
    stub = build(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    try:
        came = stub(request, metadata=metadata_of(caller), timeout=20)
        return "OK", list(came) if method.server_streaming else [came]
    except grpc.RpcError as error:
        return error_from_call(error).reason or error.code().name, []


def red_things(guarded: Served, picture: bytes) -> Iterator[Things]:
    """Things of red, new each time: some methods use them up."""

    async def begin() -> Operation:
        return guarded.service.operations.begin("red", strategies_pb2.RetuneMetadata(), lambda: None)

    with guarded.connect(token=TOKENS["red user"][0]) as client:
        digest = client.compress(picture).receipt.digest
        while True:
            yield Things(client.session().name, guarded.run(begin()).name, images_pb2.Image(digest=digest))


def test_each_method_has_its_case() -> None:
    assert CASES.keys() == METHODS.keys()


@pytest.mark.parametrize("caller", ["nobody", "unknown", "red for blue", *TOKENS])
def test_every_method_by(caller: str, guarded: Served, channel: grpc.Channel, picture: bytes) -> None:
    things = red_things(guarded, picture)
    outcomes = {
        name: call(channel, METHODS[name], case.request(next(things)), caller)[0] for name, case in CASES.items()
    }
    assert outcomes == {name: expected_outcome(caller, name) for name in CASES}


def test_what_is_listed_is_the_callers_alone(guarded: Served, channel: grpc.Channel, picture: bytes) -> None:
    red = next(red_things(guarded, picture))
    for name, field, mine in (
        ("vflow.v1.Conversations.ListSessions", "sessions", red.session),
        ("google.longrunning.Operations.ListOperations", "operations", red.operation),
    ):
        for caller, expected in (("red admin", [mine]), ("blue admin", [])):
            outcome, (response,) = call(channel, METHODS[name], CASES[name].request(red), caller)
            assert outcome == "OK" and [each.name for each in getattr(response, field)] == expected


def test_who_is_refused_learns_nothing_of_what_others_have(serve: Serve) -> None:
    served = serve(max_sessions="2", tokens="\n".join(entry.line() for _, entry in TOKENS.values()))
    with (
        served.connect(token=TOKENS["red user"][0]) as red,
        served.connect(token=TOKENS["blue user"][0]) as blue,
        red.session(),
        red.session(),
        blue.session(),
        pytest.raises(CapacityExhausted) as refused,
    ):
        blue.session()
    assert refused.value.metadata == {"resource": "sessions", "max_sessions": "2"}


def test_a_tenant_with_many_sessions_leaves_their_shares_to_others(serve: Serve) -> None:
    served = serve(max_sessions="4")

    def admitted(tenant: str) -> int:
        """How many sessions a tenant gets that wants ten."""
        with served.connect(tenant=tenant) as client, suppress(CapacityExhausted):
            for _ in range(10):
                client.session()
        return len(list(served.service.sessions.of(tenant)))

    assert [admitted(tenant) for tenant in ("loud", "two", "three", "four", "five")] == [4, 2, 1, 1, 0]


def test_who_finds_no_room_for_a_message_learns_nothing_of_what_others_have() -> None:
    async def receive() -> ServiceError:
        intake = Intake(Bounds(memory=(PROMPT_PLACES + 2) << 20, most_bytes=1 << 20))
        with intake.holding("red", 700_001), intake.holding("green", 700_002), pytest.raises(ServiceError) as refused:
            with intake.holding("blue", 900_000):
                pass
        return refused.value

    refusal = asyncio.run(receive())
    assert refusal.reason == "CAPACITY_EXHAUSTED" and str(2 << 20) in refusal.message
    assert not any(str(held) in refusal.message for held in (700_001, 700_002, 1_400_003))
