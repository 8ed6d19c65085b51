"""A running fake service, and clients of it that retry without waiting long."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.longrunning import operations_pb2_grpc

import vflow_client
from tests.client.fake_service import FakeService
from vflow_client import retune
from vflow_client.aio import retune as aio_retune
from vflow_client.v1 import compression_pb2_grpc, conversations_pb2_grpc, strategies_pb2_grpc

QUICK = vflow_client.RetryPolicy(attempts=3, first_delay=0.01, longest_delay=0.02)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def address(service: FakeService) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    conversations_pb2_grpc.add_ConversationsServicer_to_server(service, server)
    compression_pb2_grpc.add_CompressionServicer_to_server(service, server)
    strategies_pb2_grpc.add_StrategiesServicer_to_server(service, server)
    operations_pb2_grpc.add_OperationsServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    service.go_on.set()
    server.stop(grace=None).wait()


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake search goes on by one step per poll, so that waiting between them is for nothing."""
    for module in (retune, aio_retune):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


@pytest.fixture
def client(address: str) -> Iterator[vflow_client.Client]:
    with vflow_client.connect(address, timeout=10, retry=QUICK) as client:
        yield client
