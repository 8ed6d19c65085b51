"""Activations, rollbacks and what is remembered of them."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from vflow_client import Client, EtagMismatch, NothingToRollBack
from vflow_client.v1.strategies_pb2 import StrategyEvent
from vflow_server.rpc.errors import ServiceError
from vflow_server.strategies.history import MOST_BEFORE, MOST_EVENTS, History
from vflow_server.strategies.strategies import StrategyStore
from vflowopt.compression.strategy import Strategy


def events(client: Client, name: str) -> list[str]:
    return [StrategyEvent.Kind.Name(event.kind) for event in client.strategies.get(name).events]


def test_rolling_back_goes_back_one_activation_at_a_time(client: Client) -> None:
    for name in ("preset-50", "preset-25"):
        client.strategies.activate(name)
    client.strategies.activate("preset-25")  # it is active: nothing happens
    back = [client.strategies.rollback().name for _ in range(2)]
    assert back == ["strategies/preset-50", "strategies/preset-10"]
    with pytest.raises(NothingToRollBack) as refused:
        client.strategies.rollback()
    assert refused.value.metadata == {"strategy": "strategies/preset-10"}
    assert events(client, "preset-25") == ["ACTIVATED", "ROLLED_BACK"]
    assert events(client, "preset-50") == ["ACTIVATED", "REPLACED", "RESTORED", "ROLLED_BACK"]
    assert events(client, "preset-10") == ["REPLACED", "RESTORED"]
    reasons = [event.reason for event in client.strategies.get("preset-50").events]
    assert reasons == [
        "",
        "strategies/preset-25 was activated",
        "strategies/preset-25 was rolled back",
        "RollbackStrategy was called",
    ]


def test_what_was_rolled_back_is_not_come_back_to(client: Client) -> None:
    client.strategies.activate("preset-50")
    client.strategies.rollback()
    client.strategies.activate("preset-25")
    assert client.strategies.rollback().name == "strategies/preset-10"
    with pytest.raises(NothingToRollBack):
        client.strategies.rollback()


def test_a_rollback_asks_for_the_etag_as_an_activation_does(client: Client) -> None:
    old = client.strategies.get("full").etag
    now = client.strategies.activate("preset-50").etag
    with pytest.raises(EtagMismatch) as refused:
        client.strategies.rollback(etag=old)
    assert refused.value.metadata == {"strategy": "strategies/preset-50", "etag": now}
    back = client.strategies.rollback(etag=now)
    assert back.active and back.etag not in (old, now)


def test_the_history_outlives_the_process(serve: Serve, tmp_path: Path) -> None:
    first = serve(data=str(tmp_path))
    first.client.strategies.create("mine", ratios=[0.5, 0.5, 0.5])
    first.client.strategies.activate("mine")
    first.client.strategies.activate("full")
    strategy = first.client.strategies.get("mine")
    first.stop()
    second = serve(data=str(tmp_path))
    assert second.client.strategies.get("mine") == strategy
    back = [second.client.strategies.rollback().name for _ in range(2)]
    assert back == ["strategies/mine", "strategies/preset-10"]


def test_a_file_of_the_first_schema_is_read_and_written_anew(serve: Serve, tmp_path: Path) -> None:
    strategy = Strategy((0, 3), (0.5, 0.5))
    first_schema = {
        "schema": 1,
        "generation": 3,
        "active": "strategies/mine",
        "strategies": [
            {"name": "strategies/mine", "description": "old", "created": 5.0, "strategy": strategy.to_json()}
        ],
    }
    file = tmp_path / "strategies.json"
    file.write_text(json.dumps(first_schema))
    client = serve(data=str(tmp_path)).client
    mine = client.strategies.get("mine")
    assert mine.active and mine.description == "old" and mine.create_time.seconds == 5
    assert not mine.draft and not mine.HasField("provenance") and not mine.events
    with pytest.raises(NothingToRollBack):
        client.strategies.rollback()
    client.strategies.activate("full")
    assert json.loads(file.read_text())["schema"] == 2
    assert client.strategies.rollback().name == "strategies/mine"


def test_a_strategy_of_another_model_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "strategies.json"
    deep = StrategyStore(30, {}, file)

    async def activate(*names: str) -> None:
        await deep.create("strategies/deep", Strategy((0, 20), (0.5, 0.5)), "")
        for name in names:
            await deep.activate(f"strategies/{name}", "")

    asyncio.run(activate("preset-50", "deep", "full"))
    shallow = StrategyStore(6, {}, file)
    assert shallow.active.name == "strategies/full"
    assert asyncio.run(shallow.roll_back("", "a test")).name == "strategies/preset-50"


def test_what_could_not_be_written_did_not_happen(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    store = StrategyStore(6, {}, folder / "strategies.json")
    folder.write_text("a file where the folder should be")
    etag = store.etag
    for change in (
        store.activate("strategies/full", ""),
        store.create("strategies/mine", Strategy.full(), ""),
    ):
        with pytest.raises(ServiceError) as refused:
            asyncio.run(change)
        assert refused.value.reason == "STORAGE_FAILED"
    assert store.active.name == "strategies/preset-10" and store.etag == etag
    assert not store.has("strategies/mine")


def test_the_past_has_its_limits() -> None:
    history = History("a")
    for number in range(3 * MOST_EVENTS):
        history = history.activated("b" if number % 2 == 0 else "a")
    assert len(history.before) == MOST_BEFORE
    assert [len(history.events[name]) for name in "ab"] == [MOST_EVENTS, MOST_EVENTS]
    assert History.from_document(json.loads(json.dumps(history.to_document()))) == history
