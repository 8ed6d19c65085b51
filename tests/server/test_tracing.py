"""Traces, as an OpenTelemetry collector receives them, and the ids that lines of the log carry."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.server.conftest import Serve
from tests.server.served import Served
from vflow_client.v1 import conversations_pb2 as pb
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.images_pb2 import Image

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
JOINED = (("traceparent", f"00-{TRACE}-{CALLER}-01"), ("x-request-id", "order-66"), ("vflow-tenant", "acme"))


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes in spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> Span:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def below(self, parent: Span) -> list[Span]:
        found = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


def attributes(span: Span) -> dict[str, str | int]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def converse(served: Served, picture: bytes) -> str:
    """A picture, a turn with another one, and a call that is refused; all in the caller's trace."""
    with grpc.insecure_channel(served.address) as channel:
        stub = ConversationsStub(channel)
        session = stub.CreateSession(pb.CreateSessionRequest(), metadata=JOINED).name
        stub.AddImage(pb.AddImageRequest(session=session, image=Image(data=picture)), metadata=JOINED)
        request = pb.ChatRequest(session=session, parts=[pb.Part(text="And that?")], options={"max_new_tokens": 3})
        list(stub.Chat(request, metadata=JOINED))
        with pytest.raises(grpc.RpcError):
            stub.GetSession(pb.GetSessionRequest(name="sessions/none"), metadata=JOINED)
        stub.DeleteSession(pb.DeleteSessionRequest(name=session), metadata=JOINED[2:])
    return str(session)


def test_each_call_is_a_span_in_its_callers_trace_with_its_phases_below(
    serve: Serve, collector: Collector, picture: bytes
) -> None:
    served = serve(otlp_endpoint=collector.endpoint)
    session = converse(served, picture)
    served.stop()
    service = "vflow.v1.Conversations"
    chat = collector.named(f"{service}/Chat")
    assert (chat.trace_id.hex(), chat.parent_span_id.hex()) == (TRACE, CALLER)
    assert chat.kind == Span.SPAN_KIND_SERVER
    assert attributes(chat) == {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": "Chat",
        "rpc.grpc.status_code": 0,
        "vflow.tenant": "acme",
        "vflow.session": session,
        "vflow.request": "order-66",
    }
    phases = collector.below(chat)
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    for before, after in zip(phases, phases[1:], strict=False):
        assert before.end_time_unix_nano <= after.start_time_unix_nano
    assert all(
        phase.trace_id == chat.trace_id and phase.end_time_unix_nano <= chat.end_time_unix_nano for phase in phases
    )
    shown = collector.below(collector.named(f"{service}/AddImage"))
    assert [phase.name for phase in shown] == ["encode", "score", "prune", "prefill"]
    assert shown[0].end_time_unix_nano > shown[0].start_time_unix_nano
    refused = collector.named(f"{service}/GetSession")
    assert attributes(refused)["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert not refused.events  # what was refused may quote the caller
    alone = collector.named(f"{service}/DeleteSession")
    assert alone.trace_id.hex() != TRACE and not alone.parent_span_id


def test_an_unreachable_collector_harms_nobody(serve: Serve, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vflow_server.telemetry.spans.PATIENCE", 0.2)
    served = serve(otlp_endpoint="http://127.0.0.1:9")
    converse(served, picture)
    served.stop()


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:  # type: ignore[arg-type]
        yield lines


def test_lines_of_the_log_say_whose_call_they_are_of(serve: Serve, picture: bytes, lines: list[dict[str, Any]]) -> None:
    session = converse(serve(), picture)
    calls = {line["method"]: line for line in lines if line["event"] == "call"}
    whose = {name: calls["Conversations/Chat"].get(name) for name in ("request", "tenant", "session", "trace")}
    assert whose == {"request": "order-66", "tenant": "acme", "session": session, "trace": TRACE}
    alone = calls["Conversations/DeleteSession"]
    assert "trace" not in alone and alone["request"] not in ("", "order-66")
    assert "And that?" not in str(lines)


def test_what_the_engine_logs_for_a_call_says_whose_it_is(
    serve: Serve, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    check_room = served.service.kv.check_room

    def record(*arguments: Any) -> None:
        structlog.get_logger().info("within the work")
        check_room(*arguments)

    monkeypatch.setattr(served.service.kv, "check_room", record)
    with served.connect(tenant="acme") as client, client.session() as session:
        session.ask("Hello", max_new_tokens=2).read()
    (line,) = [line for line in lines if line["event"] == "within the work"]
    assert line["session"] == session.name
