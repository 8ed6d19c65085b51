"""Searches for strategies: from the request to the strategy, beside conversations, and ended before their end."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning.operations_pb2 import (
    DeleteOperationRequest,
    GetOperationRequest,
    ListOperationsRequest,
    Operation,
    WaitOperationRequest,
)
from google.longrunning.operations_pb2_grpc import OperationsStub
from google.protobuf.duration_pb2 import Duration

from tests.server.calibrating import NoProcess, samples
from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import (
    Client,
    ContextExceeded,
    Image,
    InvalidRequest,
    OperationCancelled,
    OperationInterrupted,
    OperationNotFound,
    RetuneRunning,
    Sample,
    StrategyExists,
    StrategyNotFound,
    VFlowError,
)
from vflow_client.v1.strategies_pb2 import RetuneMetadata
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture(autouse=True)
def proposals_on_the_spot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vflow_server.tuning.search.Proposer", NoProcess)


class Gate:
    """Holds searches up at the first look at hidden states after it was closed."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.held = threading.Event()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        if not self._open.is_set():
            self.held.set()
            assert self._open.wait(20)


@pytest.fixture
def gate(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, states = Gate(), runtime.states

    def gated(*arguments: Any) -> Any:
        gate.pass_through()
        return states(*arguments)

    monkeypatch.setattr(runtime, "states", gated)
    yield gate
    gate.open()


def test_a_search_ends_with_a_strategy_that_says_where_it_comes_from(serve: Serve, tmp_path: Path) -> None:
    first = serve(data=str(tmp_path))
    search = first.client.strategies.retune(0.2, samples(3), trials=5, seed=7, strategy_id="found")
    found = search.result(timeout=20)
    assert found.name == "strategies/found" and not found.draft and not found.active
    assert found.budget == pytest.approx(0.2, abs=1e-9)
    progress = search.metadata
    objectives = [trial.objective for trial in progress.tried if not trial.stopped_early]
    assert (progress.phase, len(progress.tried), progress.samples) == (RetuneMetadata.ENDED, 5, 3)
    assert progress.best == found and progress.best_objective == max(objectives) >= objectives[0]
    assert (
        progress.base == "strategies/preset-10"
        and progress.end_time.ToNanoseconds() > progress.create_time.ToNanoseconds()
    )
    source = found.provenance
    assert (source.operation, source.base) == (search.name, "strategies/preset-10")
    assert (source.samples, source.trials, source.seed) == (3, 5, 7)
    assert source.objective == progress.best_objective and source.base_objective == progress.base_objective
    assert source.model_revision == first.service.runtime.revision and source.code_version == "0.1.0"
    assert first.kv_bytes() == 0

    with first.client.session("found") as session:
        assert session.add_image(png(60, 80)).strategy == "strategies/found"
    again = first.client.strategies.retune(0.2, samples(3), trials=5, seed=7).result(timeout=20)
    assert again.name.startswith("strategies/retuned-20-") and again.ratios == found.ratios
    assert again.provenance.data_digest == source.data_digest

    first.stop()
    second = serve(data=str(tmp_path)).client.strategies
    assert second.operation(search.name).result() == found
    assert second.get("found").provenance == source


def converse(client: Client, number: int) -> list[str]:
    with client.session("full") as session:
        session.add_image(png(70, 70, seed=number))
        return [session.ask(text, max_new_tokens=24).read() for text in ("One", "Two", "Three")]


def noted(names: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which adds ``name`` to ``names`` whenever it is called."""

    def call(*arguments: Any, **options: Any) -> Any:
        names.append(name)
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("kv_budget", [32 << 20, 500 << 10], ids=["roomy", "short of pages"])
def test_conversations_beside_a_search_are_answered_as_without_it(
    serve: Serve, model_folder: Path, kv_budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the two meet often.
    monkeypatch.setattr("vflow_server.engine.scheduler.IDLE_EVERY", 2)
    runtime = Runtime.load(model_folder, kv_budget=kv_budget)
    runtime.chat.stop_ids = frozenset()
    served = serve(runtime)
    alone = [converse(served.client, number) for number in range(2)]
    steps: list[str] = []
    for name in ("step", "states"):
        monkeypatch.setattr(runtime, name, noted(steps, name, getattr(runtime, name)))
    search = served.client.strategies.retune(0.3, samples(4), trials=4)
    beside = [converse(served.client, number) for number in range(2)]
    assert beside == alone
    changes = sum(one != other for one, other in zip(steps, steps[1:], strict=False))
    assert changes > 20, "they did not meet: the test proves nothing"
    disturbed = search.result(timeout=20)
    assert served.kv_bytes() == 0
    undisturbed = served.client.strategies.retune(0.3, samples(4), trials=4).result(timeout=20)
    assert disturbed.ratios == undisturbed.ratios


def test_a_cancelled_search_leaves_the_best_so_far_as_a_draft(serve: Serve, gate: Gate) -> None:
    served = serve()
    search = served.client.strategies.retune(0.2, samples(2), trials=1000, strategy_id="wanted")
    until(lambda: len(search.refresh().tried) >= 2)
    with pytest.raises(RetuneRunning) as refused:
        served.client.strategies.retune(0.2, samples(1))
    assert refused.value.metadata == {"operation": search.name}
    with served.connect(tenant="other") as other, pytest.raises(RetuneRunning, match="of another tenant") as elsewhere:
        other.strategies.retune(0.2, samples(1))
    assert not elsewhere.value.metadata and search.name not in str(elsewhere.value)
    search.cancel()
    with pytest.raises(OperationCancelled) as ended:
        search.result(timeout=20)
    draft = search.metadata.best
    assert ended.value.metadata == {"operation": search.name, "strategy": draft.name}
    assert draft.draft and draft == served.client.strategies.get(draft.name)
    assert draft.name != "strategies/wanted", "the name is left for a search that comes to its end"
    assert draft.provenance.trials == len(search.metadata.tried) < 1000
    assert draft.provenance.objective == search.metadata.best_objective
    search.cancel()  # it has ended: nothing happens
    assert served.kv_bytes() == 0
    assert served.client.strategies.retune(0.2, samples(1), trials=1, strategy_id="wanted").result(timeout=20)


def test_a_search_that_is_cancelled_before_its_first_trial_leaves_nothing(serve: Serve, gate: Gate) -> None:
    served = serve()
    gate.close()
    search = served.client.strategies.retune(0.2, samples(2))
    assert gate.held.wait(20)
    search.cancel()
    gate.open()
    with pytest.raises(OperationCancelled) as ended:
        search.result(timeout=20)
    assert ended.value.metadata == {"operation": search.name}
    assert not search.metadata.HasField("best") and served.kv_bytes() == 0
    assert len(list(served.client.strategies.list())) == 4


def test_a_stop_of_the_service_keeps_a_draft_and_tells_of_it_afterwards(serve: Serve, tmp_path: Path) -> None:
    first = serve(data=str(tmp_path))
    search = first.client.strategies.retune(0.2, samples(2), trials=1000)
    until(lambda: len(search.refresh().tried) >= 1)
    first.stop()
    found = serve(data=str(tmp_path)).client.strategies.operation(search.name)
    with pytest.raises(OperationInterrupted) as ended:
        found.result()
    assert found.metadata.best.draft and ended.value.metadata["strategy"] == found.metadata.best.name
    assert found.metadata.phase == RetuneMetadata.ENDED


def test_a_fault_in_a_search_ends_that_search_alone(
    serve: Serve, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()

    def faulty(*arguments: Any) -> Any:
        raise ZeroDivisionError("a fault")

    with monkeypatch.context() as broken:
        broken.setattr(runtime, "states", faulty)
        search = served.client.strategies.retune(0.2, samples(1))
        with pytest.raises(VFlowError, match="INTERNAL") as ended:
            search.result(timeout=20)
    assert ended.value.metadata["incident"]
    assert converse(served.client, 1)
    assert served.client.strategies.retune(0.2, samples(1), trials=1).result(timeout=20)


def test_what_a_search_cannot_have_is_said_by_its_operation(serve: Serve, model_folder: Path) -> None:
    runtime = Runtime.load(model_folder, kv_budget=64 << 10)
    search = serve(runtime).client.strategies.retune(0.2, samples(1))
    with pytest.raises(VFlowError) as ended:
        search.result(timeout=20)
    assert (ended.value.reason, ended.value.metadata["resource"]) == ("CAPACITY_EXHAUSTED", "kv_cache")


def test_a_sample_beyond_the_context_is_said_to_be(client: Client) -> None:
    search = client.strategies.retune(0.2, samples(1, ("Short?", "a" * 9000)), trials=1)
    with pytest.raises(ContextExceeded, match="ask fewer or shorter questions"):
        search.result(timeout=20)


def test_a_budget_below_what_pictures_always_keep_is_said_to_be(client: Client) -> None:
    search = client.strategies.retune(0.001, samples(1), trials=1)
    with pytest.raises(InvalidRequest, match="out of reach") as ended:
        search.result(timeout=20)
    assert ended.value.reason == "STRATEGY_INVALID" and list(ended.value.fields) == ["budget"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a budget of nothing": ({"budget": 0.0}, "budget"),
    "a budget of all": ({"budget": 1.0}, "budget"),
    "too many trials": ({"trials": 1001}, "trials"),
    "fewer trials than none": ({"trials": -1}, "trials"),
    "a base that is no name": ({"base": "strategies/No"}, "base"),
    "an identifier that is none": ({"strategy_id": "No"}, "strategy_id"),
    "no samples": ({"calibration": []}, "calibration.samples.samples"),
    "too many samples": ({"calibration": samples(1) * 257}, "calibration.samples.samples"),
    "no question": ({"calibration": [*samples(1), Sample(png(9, 9), [])]}, "calibration.samples.samples[1].questions"),
    "too many questions": (
        {"calibration": [Sample(png(9, 9), ["What?"] * 9)]},
        "calibration.samples.samples[0].questions",
    ),
    "an empty question": (
        {"calibration": [Sample(png(9, 9), ["What?", " "])]},
        "calibration.samples.samples[0].questions[1]",
    ),
    "no picture": ({"calibration": [Sample(b"none", ["What?"])]}, "calibration.samples.samples[0].image"),
    "a digest that is none": (
        {"calibration": [Sample(Image(digest="x"), ["What?"])]},
        "calibration.samples.samples[0].image.digest",
    ),
}


@pytest.mark.parametrize(("change", "field"), REFUSED.values(), ids=REFUSED)
def test_a_request_is_refused_before_anything_begins(client: Client, change: dict[str, Any], field: str) -> None:
    request = {"budget": 0.2, "calibration": samples(1), "trials": 1, **change}
    with pytest.raises(InvalidRequest) as refused:
        client.strategies.retune(request.pop("budget"), request.pop("calibration"), **request)
    assert list(refused.value.fields) == [field]
    assert not list(client.strategies.operations())


def test_names_are_looked_up_before_anything_begins(client: Client) -> None:
    with pytest.raises(StrategyNotFound):
        client.strategies.retune(0.2, samples(1), base="nobody")
    with pytest.raises(StrategyExists):
        client.strategies.retune(0.2, samples(1), strategy_id="full")
    assert not list(client.strategies.operations())


def test_the_operations_of_another_are_not_found(served: Served) -> None:
    with served.connect(tenant="red") as red, served.connect(tenant="blue") as blue:
        search = red.strategies.retune(0.2, samples(1), trials=2)
        assert [each.name for each in red.strategies.operations()] == [search.name]
        assert not list(blue.strategies.operations())
        with pytest.raises(OperationNotFound):
            blue.strategies.operation(search.name)
        with grpc.insecure_channel(served.address) as channel:
            operations = OperationsStub(channel)
            for method, request in (
                (operations.GetOperation, GetOperationRequest(name=search.name)),
                (operations.WaitOperation, WaitOperationRequest(name=search.name)),
                (operations.CancelOperation, GetOperationRequest(name=search.name)),
                (operations.DeleteOperation, DeleteOperationRequest(name=search.name)),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    method(request, metadata=(("vflow-tenant", "blue"),))
                assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        found = search.result(timeout=20)
        assert blue.strategies.get(found.name).provenance == found.provenance, "strategies are everybody's"


def test_waiting_ends_with_the_latest_state(served: Served, gate: Gate) -> None:
    gate.close()
    search = served.client.strategies.retune(0.2, samples(1), trials=1)
    with grpc.insecure_channel(served.address) as channel:
        operations = OperationsStub(channel)
        wait = WaitOperationRequest(name=search.name, timeout=Duration(nanos=10_000_000))
        assert not operations.WaitOperation(wait).done
        # The call's own deadline comes first: it is answered before that, not lost.
        assert not operations.WaitOperation(WaitOperationRequest(name=search.name), timeout=0.5).done
        gate.open()
        ended: Operation = operations.WaitOperation(WaitOperationRequest(name=search.name), timeout=20)
        assert ended.done and ended.WhichOneof("result") == "response"
        assert operations.WaitOperation(wait) == ended


def test_what_is_deleted_is_forgotten_once_it_has_ended(served: Served, gate: Gate) -> None:
    gate.close()
    search = served.client.strategies.retune(0.2, samples(1), trials=1, strategy_id="found")
    with grpc.insecure_channel(served.address) as channel:
        operations = OperationsStub(channel)
        operations.DeleteOperation(DeleteOperationRequest(name=search.name))
        assert not search.refresh().HasField("end_time"), "it goes on"
        gate.open()
        until(lambda: not list(served.client.strategies.operations()))
        assert served.client.strategies.get("found").provenance.operation == search.name
        ended = served.client.strategies.retune(0.2, samples(1), trials=1)
        assert ended.wait(timeout=20)
        operations.DeleteOperation(DeleteOperationRequest(name=ended.name))
        with pytest.raises(OperationNotFound):
            ended.refresh()


def test_operations_are_listed_page_by_page(served: Served) -> None:
    names = []
    for _ in range(3):
        search = served.client.strategies.retune(0.2, samples(1), trials=1)
        assert search.wait(timeout=20)
        names.append(search.name)
    with grpc.insecure_channel(served.address) as channel:
        operations = OperationsStub(channel)
        first = operations.ListOperations(ListOperationsRequest(name="operations", page_size=2))
        rest = operations.ListOperations(ListOperationsRequest(page_size=2, page_token=first.next_page_token))
        assert [each.name for each in (*first.operations, *rest.operations)] == names and not rest.next_page_token
        for request in (ListOperationsRequest(name="sessions"), ListOperationsRequest(filter="done")):
            with pytest.raises(grpc.RpcError) as refused:
                operations.ListOperations(request)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
