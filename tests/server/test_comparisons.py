"""Comparing two strategies over the wire."""

import threading
from contextlib import suppress
from typing import Any

import grpc
import pytest

from tests.server.calibrating import samples
from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import CapacityExhausted, Client, StrategyNotFound
from vflow_client.calibration import to_calibration
from vflow_client.v1.strategies_pb2 import CompareStrategiesRequest
from vflow_client.v1.strategies_pb2_grpc import StrategiesStub
from vflowopt.runtime.model_runner import Runtime


def test_the_unpruned_model_agrees_with_itself_and_costs_what_it_costs(client: Client) -> None:
    compared = client.strategies.compare("full", "preset-10", samples(3), timeout=20)
    full, lean = compared.compared
    assert (full.strategy.name, lean.strategy.name) == ("strategies/full", "strategies/preset-10")
    assert (compared.samples, compared.questions) == (3, 6)
    assert full.objective == pytest.approx(1, abs=1e-5) and full.agreement == 1
    assert full.visual_tokens == full.visual_tokens_full == lean.visual_tokens_full
    assert full.kv_bytes == full.kv_bytes_full == lean.kv_bytes_full
    assert lean.objective < full.objective
    for each in (full, lean):  # two questions a sample
        assert sum(each.sample_objectives) / 3 == pytest.approx(each.objective) and len(each.sample_objectives) == 3
    # What a receipt says of such a picture is what the comparison says of their mean.
    receipts = [client.compress(png(60, 80, seed=300 + number), strategy="preset-10").receipt for number in range(3)]
    assert lean.kv_bytes == pytest.approx(sum(receipt.kv_bytes for receipt in receipts) / 3)
    assert lean.visual_tokens_full == pytest.approx(sum(receipt.visual_tokens for receipt in receipts) / 3)
    assert client.strategies.compare("full", "full", samples(3)).data_digest == compared.data_digest


def test_a_caller_that_leaves_ends_it_and_only_one_is_made_at_a_time(
    serve: Serve, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    begun, leave, states = threading.Event(), threading.Event(), runtime.states

    def held(*arguments: Any) -> Any:
        begun.set()
        assert leave.wait(20)
        return states(*arguments)

    monkeypatch.setattr(runtime, "states", held)
    request = CompareStrategiesRequest(names=["strategies/full"] * 2, calibration=to_calibration(samples(1)))
    with grpc.insecure_channel(served.address) as channel:
        first = StrategiesStub(channel).CompareStrategies.future(request)
        assert begun.wait(20)
        with pytest.raises(CapacityExhausted) as refused:
            served.client.strategies.compare("full", "full", samples(1))
        assert refused.value.metadata["resource"] == "comparisons" and refused.value.retry_after
        first.cancel()
        leave.set()
    until(lambda: served.kv_bytes() == 0)

    def again() -> bool:
        with suppress(CapacityExhausted):  # the server may learn later than the caller that the call is over
            return served.client.strategies.compare("full", "full", samples(1)).samples == 1
        return False

    until(again)


def test_names_and_their_number_are_checked(served: Served) -> None:
    with pytest.raises(StrategyNotFound):
        served.client.strategies.compare("full", "nobody", samples(1))
    with grpc.insecure_channel(served.address) as channel:
        stub = StrategiesStub(channel)
        for names in ([], ["strategies/full"], ["strategies/full"] * 3):
            with pytest.raises(grpc.RpcError, match="name two strategies"):
                stub.CompareStrategies(CompareStrategiesRequest(names=names, calibration=to_calibration(samples(1))))
        with pytest.raises(grpc.RpcError, match="give samples to calibrate on"):
            stub.CompareStrategies(CompareStrategiesRequest(names=["strategies/full"] * 2))
