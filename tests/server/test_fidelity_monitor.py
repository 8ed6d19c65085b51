"""The live watch: what it sees of turns, and what it does about it."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Client
from vflow_client.v1.strategies_pb2 import StrategyEvent
from vflow_server.access.caller import DEFAULT_TENANT
from vflow_server.rpc.errors import storage_failed
from vflow_server.strategies.strategies import StrategyStore
from vflow_server.tuning.fidelity_monitor import MOST_WAITING, FidelityMonitor, FidelityTotals
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.replay import AnsweredTurn, Fidelity


def converse(client: Client, strategy: str = "", **options: Any) -> None:
    """Three turns about two pictures."""
    with client.session(strategy) as session:
        session.add_image(png(70, 70, seed=51))
        session.ask("One", max_new_tokens=5, **options).read()
        session.ask("Two", images=[png(60, 60, seed=52)], max_new_tokens=5, **options).read()
        session.ask("Three", max_new_tokens=5, **options).read()


def totals(served: Served, strategy: str) -> FidelityTotals:
    return served.service.fidelity_monitor.totals[f"strategies/{strategy}"]


def seen(served: Served, strategy: str, turns: int) -> FidelityTotals:
    """The measurements of a strategy, once so many turns were measured or skipped."""
    until(lambda: totals(served, strategy).watched + totals(served, strategy).skipped >= turns)
    return totals(served, strategy)


def test_an_unpruned_turn_is_what_it_is_measured_against(serve: Serve) -> None:
    served = serve(watch_share="1")
    converse(served.client, "full")
    found = seen(served, "full", 3)
    assert (found.watched, found.skipped, found.tokens) == (3, 0, 15)
    assert found.cosine == pytest.approx(1, abs=1e-5) and found.agreement == 1


def test_a_pruned_turn_is_seen_to_stray(serve: Serve) -> None:
    served = serve(watch_share="1")
    converse(served.client, "preset-10")
    found = seen(served, "preset-10", 3)
    assert found.watched == 3 and found.cosine is not None and found.cosine < 0.95
    assert found.tokens == 15 and found.agreement is not None and found.agreement < 1
    converse(served.client, "preset-10", temperature=1.0, seed=1)
    assert seen(served, "preset-10", 6).tokens == 15, "the tokens of sampled answers say nothing"
    assert served.kv_bytes() == 0


def test_turns_without_pictures_and_all_turns_where_it_is_off_are_left_alone(serve: Serve) -> None:
    off = serve()
    converse(off.client)
    off.stop()
    assert not off.service.fidelity_monitor.totals
    served = serve(watch_share="1")
    with served.client.session() as session:
        session.ask("Hello?", max_new_tokens=2).read()
    converse(served.client, "full")
    seen(served, "full", 3)
    assert list(served.service.fidelity_monitor.totals) == ["strategies/full"]


def test_below_the_floor_the_strategy_before_becomes_active_again(serve: Serve, capsys: Any) -> None:
    served = serve(watch_share="1", watch_floor="0.95", watch_window="4")
    strategies = served.client.strategies
    strategies.activate("full")
    converse(served.client)
    seen(served, "full", 3)
    strategies.activate("preset-10")
    converse(served.client)
    seen(served, "preset-10", 3)
    assert strategies.get("preset-10").active, "three turns are not enough"
    converse(served.client)
    until(lambda: strategies.get("full").active)
    event = strategies.get("preset-10").events[-1]
    assert event.kind == StrategyEvent.ROLLED_BACK
    assert "mean cosine" in event.reason and "last 4 watched turns" in event.reason and "0.95" in event.reason
    assert totals(served, "preset-10").rollbacks == 1
    assert "strategy rolled back" in capsys.readouterr().out
    # What was seen before counts no more against the next activation.
    strategies.activate("preset-10")
    seen(served, "preset-10", 6)
    assert strategies.get("preset-10").active


def converse_as(served: Served, tenant: str, times: int) -> None:
    """Three turns at a time by a tenant."""
    with served.connect(tenant=tenant) as client:
        for _ in range(times):
            converse(client, "preset-10")


class Judged:
    """Cosines for the turns of each tenant, in place of the measured ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cosines: Mapping[str, float]) -> None:
        async def look(monitor: FidelityMonitor, turn: AnsweredTurn, pictures: object) -> Fidelity:
            return Fidelity(cosines[turn.tenant], 1, 1)

        monkeypatch.setattr(FidelityMonitor, "_look", look)


def test_tenants_count_equally_however_many_turns_they_take(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    Judged(monkeypatch, {"odd": 0.7, "red": 0.99, "blue": 0.99})
    served = serve(watch_share="1", watch_floor="0.85", watch_window="8")
    strategies = served.client.strategies
    strategies.activate("preset-25")
    strategies.activate("preset-10")
    converse_as(served, "red", 1)
    converse_as(served, "blue", 1)
    converse_as(served, "odd", 8)  # with all turns counted equally the mean is 0.76
    seen(served, "preset-10", 30)
    assert strategies.get("preset-10").active
    Judged(monkeypatch, {"odd": 0.7, "red": 0.8, "blue": 0.8})
    converse_as(served, "red", 3)
    converse_as(served, "blue", 3)
    until(lambda: strategies.get("preset-25").active)
    assert "3 tenants counted equally" in strategies.get("preset-10").events[-1].reason


def test_only_named_tenants_count(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    Judged(monkeypatch, {"odd": 0.1, "red": 0.5})
    served = serve(watch_share="1", watch_floor="0.85", watch_window="4", watch_tenants="red")
    strategies = served.client.strategies
    strategies.activate("preset-25")
    strategies.activate("preset-10")
    converse_as(served, "odd", 2)
    seen(served, "preset-10", 6)
    assert strategies.get("preset-10").active
    converse_as(served, "red", 2)
    until(lambda: strategies.get("preset-25").active)


def test_it_says_once_that_there_is_nothing_to_roll_back_to(serve: Serve, capsys: Any) -> None:
    served = serve(watch_share="1", watch_floor="0.95", watch_window="2")
    for _ in range(2):
        converse(served.client)
    assert seen(served, "preset-10", 6).rollbacks == 0
    assert served.client.strategies.get("preset-10").active
    assert capsys.readouterr().out.count("stays active") == 1


def test_it_tries_again_if_the_disk_did_not_let_it_roll_back(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    Judged(monkeypatch, {DEFAULT_TENANT: 0.1})
    served = serve(watch_share="1", watch_floor="0.85", watch_window="3")
    strategies = served.client.strategies
    strategies.activate("preset-25")
    strategies.activate("preset-10")
    failing = ["once", "twice"]
    write = StrategyStore._write

    async def full(store: StrategyStore, *arguments: Any) -> None:
        if failing:
            raise storage_failed(failing.pop())
        await write(store, *arguments)

    monkeypatch.setattr(StrategyStore, "_write", full)
    for _ in range(2):
        converse(served.client)
    until(lambda: strategies.get("preset-25").active)
    assert not failing and totals(served, "preset-10").rollbacks == 1


def broken(*arguments: Any) -> Any:
    raise ZeroDivisionError("a fault")


def exhausted(*arguments: Any) -> Any:
    raise PoolExhausted(1 << 30, 0, 1)


@pytest.mark.parametrize("failing", [broken, exhausted])
def test_what_cannot_be_looked_at_is_skipped(
    serve: Serve, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, failing: Callable[..., Any]
) -> None:
    served = serve(watch_share="1")
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "states", failing)
        converse(served.client)
        assert seen(served, "preset-10", 3).skipped == 3
    converse(served.client)
    assert seen(served, "preset-10", 6).watched == 3


def test_a_turn_whose_picture_is_gone_is_skipped(serve: Serve) -> None:
    served = serve(watch_share="1", picture_memory="1")
    converse(served.client)
    assert seen(served, "preset-10", 3).skipped == 3


def test_totals_only_grow() -> None:
    found = FidelityTotals()
    assert found.cosine is None and found.agreement is None
    found.add(Fidelity(0.5, 4, 1))
    found.add(Fidelity(1.0, 0, 0))
    assert (found.watched, found.cosine, found.agreement) == (2, 0.75, 0.25)


def test_one_tenant_alone_does_not_decide_for_two(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    Judged(monkeypatch, {"odd": -1.0, "red": 0.99})  # their mean is far below the floor
    served = serve(watch_share="1", watch_floor="0.85", watch_window="4")
    strategies = served.client.strategies
    strategies.activate("preset-25")
    strategies.activate("preset-10")
    converse_as(served, "red", 1)
    converse_as(served, "odd", 4)
    seen(served, "preset-10", 15)
    assert strategies.get("preset-10").active


def test_a_tenant_that_comes_first_does_not_decide_for_those_that_were_not_heard(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the turns is compared. Those of odd are, and others that use the strategy are not yet."""
    Judged(monkeypatch, {"odd": 0.1, "red": 0.1})
    heard = {"odd"}
    served = serve(watch_share="0.1", watch_floor="0.85", watch_window="4")
    chooses = FidelityMonitor.chooses

    def choose(monitor: FidelityMonitor, tenant: str, name: str, *, pictures: int) -> bool:
        chooses(monitor, tenant, name, pictures=pictures)
        return tenant in heard

    monkeypatch.setattr(FidelityMonitor, "chooses", choose)
    strategies = served.client.strategies
    strategies.activate("preset-25")
    strategies.activate("preset-10")
    converse_as(served, "red", 1)
    converse_as(served, "odd", 2)
    seen(served, "preset-10", 6)
    assert strategies.get("preset-10").active
    heard.add("red")
    converse_as(served, "red", 1)
    until(lambda: strategies.get("preset-25").active)


def test_a_tenant_with_many_turns_leaves_places_to_others(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons are held up. So many turns of one tenant wait that some are skipped, but none of the other's."""
    looked = list[str]()
    enough = asyncio.Event()

    async def look(monitor: FidelityMonitor, turn: AnsweredTurn, pictures: object) -> Fidelity:
        await enough.wait()
        looked.append(turn.tenant)
        return Fidelity(1.0, 1, 1)

    monkeypatch.setattr(FidelityMonitor, "_look", look)
    served = serve(watch_share="1")
    converse_as(served, "loud", MOST_WAITING // 3 + 2)
    converse_as(served, "quiet", 1)
    until(lambda: totals(served, "preset-10").skipped > 0)

    async def let_go() -> None:
        enough.set()

    served.run(let_go())
    until(lambda: len(looked) == MOST_WAITING + 1)
    assert looked.count("quiet") == 3 and "quiet" in looked[1:3], "tenants take turns"
