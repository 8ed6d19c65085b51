"""What health checks and callers are answered when the service goes down."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import EngineFailed


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
