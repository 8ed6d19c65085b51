"""Strategies over the wire, and the pages of listings."""

from pathlib import Path

import grpc
import pytest

from tests.server.conftest import Serve
from tests.server.served import Served
from vflow_client import Client, EtagMismatch, Strategy, StrategyExists
from vflow_client.v1.conversations_pb2 import ListSessionsRequest
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_server.store.files import FOLDER
from vflow_server.strategies.strategies import StrategyStore
from vflowopt.compression import strategy as library


def test_the_presets_are_there_and_ten_percent_is_active(client: Client) -> None:
    found = list(client.strategies.list())
    assert [strategy.name for strategy in found] == [
        f"strategies/{name}" for name in ("full", "preset-50", "preset-25", "preset-10")
    ]
    assert [round(strategy.budget, 9) for strategy in found] == [1.0, 0.5, 0.25, 0.1]
    assert [strategy.name for strategy in found if strategy.active] == ["strategies/preset-10"]
    assert all(strategy.built_in for strategy in found)


def test_a_created_strategy_is_as_it_was_described_and_never_changes(client: Client) -> None:
    made = client.strategies.create(
        "mine", ratios=[0.3, 0.5], budget=0.2, alpha=0.1, grid=3.0, positions="renumbered", description="a try"
    )
    assert made.name == "strategies/mine" and not made.active and not made.built_in
    # 2 of 6 layers each: 0.3 * 2 + 0.15 * 2 + 0.15 * R3 * 2 = 0.2 * 6.
    assert list(made.ratios) == pytest.approx([0.3, 0.5, 1.0]) and list(made.starts) == [0, 2, 4]
    assert made.budget == pytest.approx(0.2)
    assert (made.description, made.alpha, made.grid) == ("a try", 0.1, 3.0)
    assert (made.positions, made.reserve) == (Strategy.RENUMBERED, Strategy.OCCUPIED)
    assert client.strategies.get("mine") == made
    with pytest.raises(StrategyExists):
        client.strategies.create("mine", ratios=[1.0, 1.0, 0.5])


def test_a_new_active_strategy_serves_new_sessions_only(client: Client, picture: bytes) -> None:
    etag = client.strategies.get("full").etag
    with client.session() as old:
        activated = client.strategies.activate("preset-50", etag=etag)
        assert activated.active and activated.etag != etag
        with client.session() as new, client.session("preset-25") as chosen:
            strategies = [session.add_image(picture).strategy for session in (old, new, chosen)]
        assert strategies == [f"strategies/{name}" for name in ("preset-10", "preset-50", "preset-25")]
    assert client.compress(picture).receipt.strategy == "strategies/preset-50"
    with pytest.raises(EtagMismatch) as refused:
        client.strategies.activate("full", etag=etag)
    back = client.strategies.activate("preset-10")
    assert back.etag not in (etag, activated.etag)  # the same strategy as at first, but not the same choice
    with pytest.raises(EtagMismatch):
        client.strategies.activate("full", etag=etag)
    assert refused.value.metadata == {"strategy": "strategies/preset-50", "etag": activated.etag}


def test_created_strategies_outlive_the_process(serve: Serve, tmp_path: Path) -> None:
    first = serve(data=str(tmp_path))
    made = first.client.strategies.create("mine", ratios=[0.5, 0.5, 0.5], description="kept")
    active = first.client.strategies.activate("mine")
    first.stop()
    found = serve(data=str(tmp_path)).client.strategies.get("mine")
    assert found == active and found.create_time == made.create_time


def test_a_stored_strategy_that_does_not_fit_is_kept_for_its_own_model(serve: Serve, tmp_path: Path) -> None:
    first = serve(data=str(tmp_path))
    first.client.strategies.create("mine", ratios=[0.5, 0.5], starts=[0, 5])
    first.stop()
    file = tmp_path / "strategies.json"
    file.write_text(file.read_text().replace("[0,5]", "[0,50]"))
    second = serve(data=str(tmp_path))
    assert len(list(second.client.strategies.list())) == 4
    with pytest.raises(StrategyExists):
        second.client.strategies.create("mine", ratios=[0.5, 0.5, 0.5])
    second.client.strategies.create("other", ratios=[0.5, 0.5, 0.5])
    assert "[0,50]" in file.read_text()


@pytest.mark.parametrize("name", ["strategies.json", "operations.json"])
@pytest.mark.parametrize("content", ['{"schema": 0}', '{"schema": 1', "[]", "\udcff"], ids=repr)
def test_a_foreign_file_is_set_aside(
    serve: Serve, tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    client = serve(data=str(tmp_path)).client
    assert len(list(client.strategies.list())) == 4
    (kept,) = (tmp_path / FOLDER).iterdir()
    assert kept.read_bytes() == content.encode(errors="surrogateescape")
    assert str(kept) in "".join(capsys.readouterr().out.split("\n"))


@pytest.mark.parametrize("name", ["strategies.json", "operations.json"])
def test_a_file_of_a_newer_release_is_left_alone(serve: Serve, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"schema": 99}')
    with pytest.raises(ValueError, match=f"{name} was written by a newer release"):
        serve(data=str(tmp_path))
    assert (tmp_path / name).read_text() == '{"schema": 99}'


def test_pages_cover_everything_once(served: Served) -> None:
    names = [served.client.session().name for _ in range(5)]
    with grpc.insecure_channel(served.address) as channel:
        stub = ConversationsStub(channel)
        seen: list[list[str]] = []
        token = ""
        while not seen or token:
            page = stub.ListSessions(ListSessionsRequest(page_size=2, page_token=token))
            seen.append([session.name for session in page.sessions])
            token = page.next_page_token
            if len(seen) == 1:  # what has been shown may go without disturbing the rest
                served.client.attach(names[0]).delete()
    assert seen == [names[:2], names[2:4], names[4:]]


def test_a_model_brings_strategies_of_its_own_and_the_first_is_active() -> None:
    brought = {f"tuned-{100 * budget:.0f}": library.Strategy.preset(budget, 6) for budget in (0.1, 0.5)}
    store = StrategyStore(6, brought)
    names = [revision.name for revision in store]
    assert names[-2:] == ["strategies/tuned-10", "strategies/tuned-50"]
    assert store.active.name == "strategies/tuned-10"
    assert store.active.strategy == brought["tuned-10"] and store.active.built_in
    assert StrategyStore(6, {}).active.name == "strategies/preset-10"
