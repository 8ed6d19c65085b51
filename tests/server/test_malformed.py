"""Malformed requests over every method, by the thousand: each is refused with a reason or taken, and leaves nothing."""

import signal
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.longrunning.operations_pb2 import CancelOperationRequest, Operation, WaitOperationRequest
from google.longrunning.operations_pb2_grpc import OperationsStub
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.server.fuzz import METHODS, SESSION, Call, calls
from tests.server.restartable_server import Parent, RestartableServer, free_port
from tests.server.waiting import until
from vflow_client.v1 import conversations_pb2 as chat
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.errors_pb2 import ErrorReason

CHAT = chat.DESCRIPTOR.services_by_name["Conversations"].methods_by_name["Chat"]

ROUND = 10
"""Requests of a method at a time."""

TALKED_TO = 50
"""Requests after which the session that they name is another one: at some time its context is full."""

SLACK = 4
"""Threads and descriptors that may come and go: of gRPC's own pool, and the connection that asks for the census."""


@dataclass(frozen=True)
class Census:
    """What the service has when nobody asks anything of it."""

    lost_pages: float
    sessions: float
    threads: int
    descriptors: int
    children: int


class Assailant:
    """Sends calls to a service, and judges what comes back.

    Args:
        server: the service.
    """

    def __init__(self, server: RestartableServer, channel: grpc.Channel) -> None:
        self._server = server
        self._channel = channel
        self._chat = ConversationsStub(channel)
        self._operations = OperationsStub(channel)
        self._made: deque[tuple[str, str]] = deque()
        self._session = self._chat.CreateSession(chat.CreateSessionRequest()).name
        assert len(self._session) == len(SESSION)
        self.sent = 0
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.resident: list[int] = []

    def send(self, call: Call) -> None:
        """Send one; fails unless it is taken, or refused as the contract says."""
        if self.sent % TALKED_TO == 0:
            self._delete(self._session, "default")
            self._session = self._chat.CreateSession(chat.CreateSessionRequest()).name
        metadata = [] if call.tenant is None else [("vflow-tenant", call.tenant)]
        message = call.message.replace(SESSION.encode(), self._session.encode())
        try:
            self._clean_up(self._answer(call, message, metadata), call.tenant or "default")
            outcome = "OK"
        except grpc.RpcError as error:
            outcome = _reason(error)
        self.sent += 1
        self.outcomes[call.method.full_name, outcome] += 1
        self.resident.append(self._server.process.memory_info().rss)

    def census(self) -> Census:
        """What is left when all sessions of the calls are gone."""
        while self._made:
            self._delete(*self._made.pop())
        self._delete(self._session, "default")
        self._session = ""
        until(lambda: not self._server.gauges()["vflow_requests_running"], 20)
        gauges, process = self._server.gauges(), self._server.process
        lost = self._server.lost_pages()
        self._session = self._chat.CreateSession(chat.CreateSessionRequest()).name
        return Census(
            lost_pages=lost,
            sessions=sum(value for name, value in gauges.items() if name.startswith("vflow_sessions{")),
            threads=process.num_threads(),
            descriptors=process.num_fds(),
            # Beside the one that Python keeps from the first search on.
            children=sum(
                not any(expected in " ".join(child.cmdline()) for expected in ("resource_tracker", "decoding_process"))
                for child in process.children()
            ),
        )

    def _answer(self, call: Call, message: bytes, metadata: list[tuple[str, str]]) -> Message | None:
        """What a call comes to, of a stream the beginning: then the caller goes away."""
        path = f"/{call.method.containing_service.full_name}/{call.method.name}"
        response = GetMessageClass(call.method.output_type)
        if not call.method.server_streaming:
            method = self._channel.unary_unary(path, response_deserializer=response.FromString)
            answered: Message = method(message, metadata=metadata, timeout=60)
            return answered
        stream = self._channel.unary_stream(path, response_deserializer=response.FromString)
        events = stream(message, metadata=metadata, timeout=60)
        next(events)
        events.cancel()
        return None

    def _clean_up(self, answered: Message | None, tenant: str) -> None:
        """Bound what calls that were taken have begun."""
        if isinstance(answered, chat.Session) and answered.name != self._session:
            self._made.append((answered.name, tenant))
            if len(self._made) > 4:
                self._delete(*self._made.popleft())
        elif isinstance(answered, Operation) and not answered.done:
            self._operations.CancelOperation(
                CancelOperationRequest(name=answered.name), metadata=[("vflow-tenant", tenant)]
            )
            self._operations.WaitOperation(
                WaitOperationRequest(name=answered.name), metadata=[("vflow-tenant", tenant)], timeout=60
            )

    def _delete(self, name: str, tenant: str) -> None:
        with suppress(grpc.RpcError):  # some call may have done so
            self._chat.DeleteSession(chat.DeleteSessionRequest(name=name), metadata=[("vflow-tenant", tenant)])


def _reason(error: grpc.RpcError) -> str:
    """Why a call was refused, which must be for a fault of its own."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details), error
    assert info.domain == "vflow.dev" and info.reason in ErrorReason.keys(), error
    assert info.reason not in ("INTERNAL", "ENGINE_FAILED", "SERVER_STOPPING"), error
    return info.reason


def attack(assailant: Assailant, method: MethodDescriptor, number: int) -> None:
    """Send a round of calls of a method, others for every number."""

    @seed(f"{method.full_name} {number}")
    @settings(
        max_examples=ROUND,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(method))
    def send(call: Call) -> None:
        assailant.send(call)

    send()


@pytest.mark.parametrize("rounds", [2, pytest.param(46, marks=pytest.mark.long)])
def test_malformed_requests_leave_nothing(rounds: int, parent: Parent, model_folder: Path, tmp_path: Path) -> None:
    server = RestartableServer(
        parent,
        tmp_path / "log",
        model=model_folder,
        kv_budget="2MiB",
        max_sessions=8,
        max_picture_pixels=100_000,
        picture_memory="1MiB",
        compressed_memory="1MiB",
        offload_memory="1MiB",
        metrics_port=free_port(),
    )
    try:
        with grpc.insecure_channel(server.address) as channel:
            assailant = Assailant(server, channel)
            counted = []
            for number in range(rounds):
                for method in (*METHODS, CHAT, CHAT):  # which is most easily refused, and does most
                    attack(assailant, method, number)
                if number + 1 in (rounds // 2, rounds):
                    counted.append(assailant.census())
        half, end = counted
        assert end.lost_pages == end.sessions == end.children == 0
        assert end.threads <= half.threads + SLACK and end.descriptors <= half.descriptors + SLACK
        if rounds > 40:  # before, caches still fill
            later = assailant.resident[assailant.sent // 2 :]
            assert max(later) <= 1.05 * later[0]
        assert assailant.sent == rounds * ROUND * (len(METHODS) + 2)
        sooner_or_later = ["Conversations.Chat", "Conversations.AddImage", "Compression.CompressImage"]
        if rounds > 40:  # all frames of a video must be right
            sooner_or_later.append("Conversations.AddVideo")
        for taken in sooner_or_later:
            assert assailant.outcomes[f"vflow.v1.{taken}", "OK"], f"no {taken} was taken: the test proves little"
        with server.client() as client, client.session() as session:
            assert session.ask("Still there?", max_new_tokens=2, min_new_tokens=2).read()
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    finally:
        server.close()
    assert not [line for line in server.logged() if line["level"] == "error"]
