"""What health checks and callers are answered when the service goes down."""

import socket
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import EngineFailed
from vflow_server.cli import main
from vflow_server.health_command import address_from


def health(channel: grpc.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    status: int = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
    return status


@pytest.mark.parametrize("service", ["", "vflow.v1.Conversations", "vflow.v1.Compression", "vflow.v1.Strategies"])
def test_a_dead_engine_is_not_serving_and_refuses_at_once(served: Served, service: str) -> None:
    def die() -> None:
        raise SystemExit

    session = served.client.session()
    under_way = session.ask("Go on", max_new_tokens=4000)
    next(under_way)
    with grpc.insecure_channel(served.address) as channel:
        assert health(channel, service) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(Exception, match="ENGINE_FAILED|restarted"):
            served.on_engine(die)
        until(lambda: health(channel, service) == health_pb2.HealthCheckResponse.NOT_SERVING)
    for answer in (under_way, session.ask("Still there?")):
        with pytest.raises(EngineFailed):
            answer.read()
    assert served.service.kv.check() == 0  # the turn under way was undone


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({}, "127.0.0.1:50051"),
        ({"VFLOW_PORT": "7"}, "127.0.0.1:7"),
        ({"VFLOW_HOST": "::1", "VFLOW_PORT": "7"}, "[::1]:7"),
        ({"VFLOW_HOST": "[::1]"}, "[::1]:50051"),
        ({"VFLOW_HOST": "10.0.0.1"}, "10.0.0.1:50051"),
        ({"VFLOW_HOST": "0.0.0.0"}, "127.0.0.1:50051"),
        ({"VFLOW_HOST": "::"}, "localhost:50051"),
        ({"VFLOW_HOST": "", "VFLOW_PORT": "", "VFLOW_ADDRESS": ""}, "127.0.0.1:50051"),
        ({"VFLOW_HOST": "10.0.0.1", "VFLOW_PORT": "7", "VFLOW_ADDRESS": "vflow:9"}, "vflow:9"),
    ],
)
def test_the_address_of_a_health_check(environment: dict[str, str], address: str) -> None:
    assert address_from(environment) == address


@pytest.mark.parametrize("by", ["VFLOW_ADDRESS", "VFLOW_HOST and VFLOW_PORT"])
def test_a_health_check_by_the_environment(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # no proxy leads to this machine
    host, _, port = served.address.partition(":")
    if by == "VFLOW_ADDRESS":
        monkeypatch.setenv("VFLOW_ADDRESS", served.address)
    else:
        monkeypatch.setenv("VFLOW_HOST", host)
        monkeypatch.setenv("VFLOW_PORT", port)
    assert main(["health"]) == 0
    assert capsys.readouterr().out == f"{served.address}: SERVING\n"


def test_a_health_check_does_not_wait_for_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.monotonic()
    assert main(["health", "--address", f"127.0.0.1:{port}"]) == 1
    assert time.monotonic() - began < 2.0 and "Connection refused" in capsys.readouterr().err
    assert main(["health", "--address", "no address"]) == 2
