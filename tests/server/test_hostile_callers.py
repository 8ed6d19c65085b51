"""What callers send, or leave unsent: it costs others neither time nor memory, and leaves nothing behind."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.hostile_callers import (
    ADD_IMAGE,
    CHAT,
    HEALTH_CHECK,
    HEALTH_WATCH,
    REFLECTION,
    RESET,
    HostileCaller,
    holding_back,
    hostile_callers,
)
from tests.server.restartable_server import Parent, RestartableServer, free_port
from tests.server.waiting import until
from vflow_client import RetryPolicy, connect
from vflow_client.v1 import compression_pb2
from vflow_server.interceptors import guard, messages
from vflow_server.rpc import answer_writer, intake

MIB = 2**20
LARGE = 60 * MIB

BYSTANDERS = 10.0
"""Seconds in which a turn, a small picture and a health check must each be done, however slow the machine."""

GROWTH = (512 + 3 * 64 + 64) * MIB
"""Bytes of memory that messages may take in all: --message-memory, and copies of the one that has just come."""

INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED = 3, 4, 8
REFUSED = {RESOURCE_EXHAUSTED, RESET}


@pytest.fixture(scope="module")
def server(parent: Parent, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartableServer]:
    server = RestartableServer(
        parent,
        tmp_path_factory.mktemp("hostile") / "log",
        model=model_folder,
        kv_budget="8MiB",
        tenant_turns=2,
        metrics_port=free_port(),
    )
    with server.client() as client:  # which takes up what is taken up once
        for size in (32 * MIB, 50 * MIB):
            with pytest.raises(Exception, match="PICTURE_TOO_LARGE"):
                client.compress(bytes(size))
    yield server
    server.close()


def left_over(server: RestartableServer) -> dict[str, float]:
    """What the service has of messages and calls."""
    names = ("vflow_messages_on_the_way", "vflow_messages_waiting", "vflow_message_bytes", "vflow_calls_open")
    return {name: value for name, value in server.gauges().items() if name.startswith(names) and value}


@contextmanager
def bounded(server: RestartableServer) -> Iterator[None]:
    """Fails if memory grows by more than it may within the block, or if something is left after it."""
    before, most, enough = server.process.memory_info().rss, 0, Event()

    def weigh() -> None:
        nonlocal most
        while not enough.wait(0.02):
            most = max(most, server.process.memory_info().rss)

    weighing = Thread(target=weigh)
    weighing.start()
    try:
        yield
    finally:
        enough.set()
        weighing.join()
    until(lambda: not left_over(server))
    assert most - before < GROWTH


def served(server: RestartableServer, tenant: str = "bystander") -> None:
    """Use the service as another tenant does, who never retries."""
    times: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        times[what] = time.monotonic() - begun

    with connect(server.address, tenant=tenant, timeout=30, retry=RetryPolicy(attempts=1)) as client:
        with timed("session"), client.session() as session:
            with timed("picture"):
                session.add_image(png(60, 60))
            with timed("turn"):
                assert session.ask("What is it?", max_new_tokens=2, min_new_tokens=2).read()
    with timed("check"), grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    slow = {what: seconds for what, seconds in times.items() if seconds > BYSTANDERS}
    assert not slow, slow


@pytest.mark.parametrize("method", [HEALTH_WATCH, REFLECTION, HEALTH_CHECK])
def test_open_methods_hold_few_calls(server: RestartableServer, method: str) -> None:
    """Whoever has no token opens as many calls as the connections take, and holds them."""
    with bounded(server), hostile_callers(server.address, 4) as callers:
        for caller in callers:
            for _ in range(300):
                stream = caller.call(method)
                if method == HEALTH_WATCH:
                    caller.send(stream, b"")
            caller.listen(0.2)
        served(server)
        held = server.gauges()['vflow_calls_open{access="none"}']
        assert held <= len(callers) * messages.MOST_OPEN_EACH
        if method != HEALTH_CHECK:
            assert held <= len(callers) * messages.MOST_STREAMS_EACH
        for caller in callers:
            assert set(caller.ended.values()) <= {*REFUSED, DEADLINE_EXCEEDED}
            caller.listen(5, lambda caller=caller: len(caller.ended) >= 300 - messages.MOST_OPEN_EACH)
            assert len(caller.ended) >= 300 - messages.MOST_OPEN_EACH


@pytest.mark.parametrize("tenants", [1, 12])
def test_calls_without_a_message_take_no_more_than_the_quota(server: RestartableServer, tenants: int) -> None:
    with bounded(server), hostile_callers(server.address, 12, [f"tenant-{n}" for n in range(tenants)]) as callers:
        for caller in callers:
            for _ in range(100):
                caller.call(CHAT)
        served(server)
        for caller in callers:
            caller.listen(5, lambda caller=caller: caller.open_calls <= 2)
            assert caller.open_calls <= 2
            assert set(caller.ended.values()) <= REFUSED
        until(lambda: server.gauges()['vflow_calls_open{access="tenant"}'] <= 2 * tenants)
        served(server)


@pytest.mark.parametrize(("method", "tenants"), [(HEALTH_CHECK, 1), (ADD_IMAGE, 1), (ADD_IMAGE, 12)])
def test_a_message_whose_last_byte_is_held_back(server: RestartableServer, method: str, tenants: int) -> None:
    with bounded(server), holding_back(server.address, method, [f"tenant-{n}" for n in range(tenants)], LARGE):
        for _ in range(3):
            served(server)
            time.sleep(1)


def test_large_messages_to_open_methods(server: RestartableServer) -> None:
    with bounded(server):
        workers = [Thread(target=_check, args=(server.address, b"\x0a" + bytes(LARGE))) for _ in range(12)]
        for worker in workers:
            worker.start()
        served(server)
        for worker in workers:
            worker.join()


def _check(address: str, message: bytes) -> None:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(HEALTH_CHECK)(message, timeout=30)
        assert refused.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)


def test_an_open_method_takes_small_messages_only(server: RestartableServer) -> None:
    with HostileCaller(server.address) as caller:
        stream = caller.call(HEALTH_CHECK)
        caller.send(stream, bytes(messages.MOST_OPEN_BYTES + 1))
        assert caller.listen(5, lambda: stream in caller.ended)
        assert caller.ended[stream] == INVALID_ARGUMENT and "4096" in caller.messages[stream]


def test_a_message_of_too_many_fields_is_refused_unparsed(server: RestartableServer) -> None:
    """Two bytes a part: parsed it would take two dozen times as much."""
    before = server.process.memory_info().rss
    most = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.address, most) as channel, pytest.raises(grpc.RpcError) as refused:
        next(channel.unary_stream(CHAT)(b"\x12\x00" * (16 * MIB), timeout=30))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "fields" in str(refused.value.details())
    assert server.process.memory_info().rss - before < 256 * MIB


def test_a_message_that_does_not_come_is_timed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    for each in (served.service.messages.intake, served.service.messages.open_intake):
        monkeypatch.setattr(each, "_bounds", replace(each._bounds, longest=0.2))
    for method in (CHAT, HEALTH_CHECK, HEALTH_WATCH, REFLECTION):
        with HostileCaller(served.address) as caller:
            stream = caller.call(method)
            assert caller.listen(5, lambda stream=stream, caller=caller: stream in caller.ended)
            assert caller.ended[stream] == DEADLINE_EXCEEDED
            assert "did not come within 0.2 seconds" in caller.messages[stream]
    until(lambda: not served.service.messages.on_the_way)


def test_a_slow_message_is_only_cut_if_others_wait(serve: Serve) -> None:
    served = serve(message_memory="384MiB")  # four places
    with HostileCaller(served.address, tenant="slow") as slow, HostileCaller(served.address, tenant="slow") as others:
        stream = slow.call(ADD_IMAGE)
        until(lambda: served.service.messages.on_the_way == 1)
        assert not slow.listen(0.5, lambda: stream in slow.ended)
        waiting = [others.call(ADD_IMAGE) for _ in range(6)]
        assert others.listen(5, lambda: len(others.ended) >= 1)
        assert {others.ended[each] for each in waiting if each in others.ended} == {RESOURCE_EXHAUSTED}
        slow.send(stream, b"")
        assert slow.listen(5, lambda: stream in slow.ended) and slow.ended[stream] == INVALID_ARGUMENT
    until(lambda: not served.service.messages.on_the_way)


def test_who_watches_and_reads_nothing_does_not_keep_the_service_from_stopping(serve: Serve) -> None:
    served = serve(grace="1s")
    with HostileCaller(served.address, window=0) as caller:
        caller.send(caller.call(HEALTH_WATCH), b"")
        until(lambda: served.service.messages.open_streams.total == 1)
        begun = time.monotonic()
        served.stop()
        assert time.monotonic() - begun < 5


def test_an_answer_that_nobody_reads_counts_until_it_is_let_go(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC holds it as long as the connection lives. Meanwhile it counts against what its tenant may have."""
    monkeypatch.setattr(answer_writer, "SLOWEST_READER", 0.2)
    monkeypatch.setattr(guard, "_LAST_WORD", 0.2)
    monkeypatch.setattr(intake, "SHORT", 1000)
    served = serve(tenant_turns="2")
    held = served.service.messages
    request = compression_pb2.CompressImageRequest(image={"data": png(400, 400)}, strategy="strategies/full")
    request.include_embeddings = True
    with HostileCaller(served.address, window=0) as caller:
        for number in range(1, 4):
            caller.send(caller.call("/vflow.v1.Compression/CompressImage"), request.SerializeToString())
            until(lambda open=number: held.calls.total == open)
            until(lambda: not served.service.quotas.under_way("default"))  # it is not working any more
        time.sleep(0.5)  # longer than what waits for a reader
        assert held.calls.total == 3 and held.bytes_held > 3 * 1000
    until(lambda: not held.calls.total and not held.bytes_held)
