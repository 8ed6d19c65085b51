"""Searching for strategies, rolling back and comparing, with both faces against a fake service."""

import asyncio
import threading
import time
from typing import Any

import grpc
import pytest
from google.longrunning.operations_pb2 import Operation
from google.rpc import code_pb2, status_pb2

import vflow_client
import vflow_client.aio
from tests.client.conftest import QUICK
from tests.client.fake_search import OBJECTIVES, found_strategy
from tests.client.fake_service import FakeService, Refusal
from vflow_client import LiveTraffic, RetuneMetadata, Sample
from vflow_client.errors import error_from_status

SAMPLES = [Sample(b"picture", ["What?", "Where?"])]
GONE = Refusal(grpc.StatusCode.UNAVAILABLE)


def connect_aio(address: str) -> vflow_client.aio.AsyncClient:
    return vflow_client.aio.connect(address, timeout=10, retry=QUICK)


def check_course(seen: list[RetuneMetadata]) -> None:
    """What an observer must see of the fake search, from its beginning to its end."""
    assert [(metadata.phase, len(metadata.tried)) for metadata in seen] == [
        (RetuneMetadata.ENCODING, 0),
        (RetuneMetadata.ANSWERING, 0),
        *((RetuneMetadata.SEARCHING, trials) for trials in (1, 2, 3, 4)),
        (RetuneMetadata.ENDED, 4),
    ]
    assert [trial.objective for trial in seen[-1].tried] == list(OBJECTIVES)


def test_a_search_from_its_request_to_its_strategy(client: vflow_client.Client, service: FakeService) -> None:
    search = client.strategies.retune(0.1, SAMPLES, trials=4, seed=7, base="preset-10", strategy_id="tuned-one")
    assert search.name == "operations/one" and not search.done
    check_course(list(search))
    assert search.done and search.result() == found_strategy("operations/one")
    assert [metadata.phase for metadata in search] == [RetuneMetadata.ENDED], "it can be looked at again"
    request = service.requests["Retune"][0]
    assert (request.budget, request.trials, request.seed) == (0.1, 4, 7)
    assert (request.base, request.strategy_id) == ("strategies/preset-10", "tuned-one")
    assert list(request.calibration.samples.samples[0].questions) == ["What?", "Where?"]
    assert all(wait.name == "operations/one" for wait in service.requests["WaitOperation"])


def test_a_search_with_asyncio(address: str, service: FakeService) -> None:
    async def follow() -> None:
        async with connect_aio(address) as client:
            search = await client.strategies.retune(0.1, LiveTraffic(max_samples=9))
            assert (await search.refresh()).phase == RetuneMetadata.ENCODING
            check_course([metadata async for metadata in search])
            assert await search.result() == found_strategy("operations/one")
            again = await client.strategies.operation("one")
            assert again.done and await again.wait() and await again.result() == found_strategy("operations/one")
            assert [found.name async for found in client.strategies.operations()] == [
                "operations/one",
                "operations/old",
            ]

    asyncio.run(follow())
    request = service.requests["Retune"][0]
    assert request.calibration.live.max_samples == 9
    assert (request.trials, request.base, request.strategy_id) == (0, "", "")
    assert service.requests["GetOperation"][1].name == "operations/one"


def test_a_search_is_found_again(client: vflow_client.Client, service: FakeService) -> None:
    assert [search.name for search in client.strategies.operations()] == ["operations/one", "operations/old"]
    assert {request.name for request in service.requests["ListOperations"]} == {"operations"}
    search = client.strategies.operation("operations/one")
    assert search.refresh().phase == RetuneMetadata.ENCODING
    assert search.result() == found_strategy("operations/one")
    service.refusals["GetOperation"] = [
        Refusal(grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND", metadata={"operation": "operations/gone"})
    ]
    with pytest.raises(vflow_client.OperationNotFound):
        client.strategies.operation("gone")
    assert service.requests["GetOperation"][-1].name == "operations/gone"


def test_waiting_has_an_end(client: vflow_client.Client, service: FakeService, address: str) -> None:
    service.search.endless = True
    search = client.strategies.retune(0.1, SAMPLES)
    assert not search.wait(0.03)
    with pytest.raises(vflow_client.DeadlineExceeded, match="operations/one did not end within 0.03 s; it goes on"):
        search.result(0.03)
    assert not search.wait(0)

    async def wait() -> None:
        async with connect_aio(address) as asynchronous:
            same = await asynchronous.strategies.operation("one")
            with pytest.raises(vflow_client.DeadlineExceeded):
                await same.result(0.03)

    asyncio.run(wait())


def test_only_changes_are_told(client: vflow_client.Client, service: FakeService) -> None:
    service.search.endless = True
    course = iter(client.strategies.retune(0.1, SAMPLES))
    while len(next(course).tried) < 2:
        pass
    later = threading.Timer(0.1, service.search.cancel)
    later.start()
    assert [metadata.phase for metadata in course] == [RetuneMetadata.ENDED]
    assert len(service.requests["WaitOperation"]) > 6


def test_a_service_that_answers_at_once_is_not_asked_without_pause(
    client: vflow_client.Client, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vflow_client.retune.POLL_SECONDS", 0.05)
    search = client.strategies.retune(0.1, SAMPLES)
    started = time.monotonic()
    search.wait()
    polls = len(service.requests["WaitOperation"])
    assert polls == 2 + len(OBJECTIVES) and time.monotonic() - started >= 0.05 * (polls - 1)


def test_a_lost_connection_is_bridged(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["WaitOperation"] = [GONE, GONE]
    assert client.strategies.retune(0.1, SAMPLES).result().name == "strategies/tuned-one"


@pytest.mark.parametrize("trials", [0, 2])
def test_a_cancelled_search(client: vflow_client.Client, service: FakeService, trials: int) -> None:
    service.search.endless = True
    search = client.strategies.retune(0.1, SAMPLES)
    while len(search.metadata.tried) < trials:
        assert not search.wait(0.01)
    search.cancel()
    with pytest.raises(vflow_client.OperationCancelled) as caught:
        search.result()
    draft = "strategies/tuned-draft" if trials else ""
    assert search.metadata.best.name == draft and caught.value.metadata.get("strategy", "") == draft
    search.cancel()
    assert search.done, "cancelling twice does no harm"


def test_a_cancelled_search_with_asyncio(address: str, service: FakeService) -> None:
    service.search.endless = True

    async def cancel() -> None:
        async with connect_aio(address) as client:
            search = await client.strategies.retune(0.1, SAMPLES)
            await search.cancel()
            with pytest.raises(vflow_client.OperationCancelled):
                await search.result()

    asyncio.run(cancel())


def test_a_search_that_the_service_did_not_survive(client: vflow_client.Client, service: FakeService) -> None:
    search = client.strategies.retune(0.1, SAMPLES)
    service.search.fail(code_pb2.ABORTED, "OPERATION_INTERRUPTED", draft="strategies/tuned-draft")
    for _ in range(2):
        with pytest.raises(vflow_client.OperationInterrupted, match="ended on purpose") as caught:
            search.result()
        assert caught.value.metadata == {"operation": "operations/one", "strategy": "strategies/tuned-draft"}
        assert caught.value.code is grpc.StatusCode.ABORTED


def test_an_operation_with_neither_strategy_nor_error(client: vflow_client.Client, service: FakeService) -> None:
    old = next(search for search in client.strategies.operations() if search.name == "operations/old")
    with pytest.raises(vflow_client.ServerFault, match="neither a strategy nor an error"):
        old.result()


def test_a_status_without_details_becomes_the_error_of_its_code() -> None:
    error = error_from_status(status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="full"))
    assert type(error) is vflow_client.ResourceExhausted and error.message == "full" and error.reason is None
    strange = error_from_status(status_pb2.Status(code=99))
    assert type(strange) is vflow_client.VFlowError and strange.code is grpc.StatusCode.UNKNOWN


def test_a_second_search_is_told_of_the_first(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["Retune"] = [
        Refusal(grpc.StatusCode.ABORTED, "RETUNE_RUNNING", metadata={"operation": "operations/one"})
    ]
    with pytest.raises(vflow_client.RetuneRunning) as caught:
        client.strategies.retune(0.1, SAMPLES)
    assert client.strategies.operation(caught.value.metadata["operation"]).name == "operations/one"


def test_beginning_a_search_and_rolling_back_are_not_repeated(
    client: vflow_client.Client, service: FakeService
) -> None:
    calls: dict[str, Any] = {
        "Retune": lambda: client.strategies.retune(0.1, SAMPLES),
        "RollbackStrategy": client.strategies.rollback,
        "CompareStrategies": lambda: client.strategies.compare("a", "b", LiveTraffic()),
    }
    for method, call in calls.items():
        service.refusals[method] = [GONE]
        with pytest.raises(vflow_client.Unavailable):
            call()
        assert len(service.requests[method]) == 1, method


def test_rolling_back(client: vflow_client.Client, service: FakeService, address: str) -> None:
    assert client.strategies.rollback(etag="e1").name == "strategies/preset-25"
    assert service.requests["RollbackStrategy"][0].etag == "e1"
    service.refusals["RollbackStrategy"] = [Refusal(grpc.StatusCode.FAILED_PRECONDITION, "NOTHING_TO_ROLL_BACK")]

    async def roll_back() -> None:
        async with connect_aio(address) as asynchronous:
            with pytest.raises(vflow_client.NothingToRollBack):
                await asynchronous.strategies.rollback()
            assert (await asynchronous.strategies.rollback()).active

    asyncio.run(roll_back())


def test_comparing(client: vflow_client.Client, service: FakeService, address: str) -> None:
    service.refusals["CompareStrategies"] = [GONE]
    compared = client.strategies.compare("full", "strategies/mine", SAMPLES)
    assert [one.strategy.name for one in compared.compared] == ["strategies/full", "strategies/mine"]
    assert len(service.requests["CompareStrategies"]) == 2, "with samples of one's own it may be repeated"
    service.refusals["CompareStrategies"] = [Refusal(grpc.StatusCode.FAILED_PRECONDITION, "CALIBRATION_UNAVAILABLE")]

    async def compare() -> None:
        async with connect_aio(address) as asynchronous:
            with pytest.raises(vflow_client.CalibrationUnavailable):
                await asynchronous.strategies.compare("full", "mine", LiveTraffic())
            assert (await asynchronous.strategies.compare("full", "mine", SAMPLES)).questions == 4

    asyncio.run(compare())
    assert service.requests["CompareStrategies"][-1].calibration.samples.samples[0].image.data == b"picture"


def test_only_operations_of_searches_have_metadata() -> None:
    assert vflow_client.Retune(Operation(name="operations/other"), None, None).metadata == RetuneMetadata()  # type: ignore[arg-type]
