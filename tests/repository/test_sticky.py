"""The examples of callers that stay with their replica, against servers that only say which they are."""

import importlib.util
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from types import ModuleType

import grpc
import pytest

from tests.repository.source import ROOT

KEYS = [f"order-{number}" for number in range(60)]
BOUND = 30.0
"""Seconds that a connection may take; it takes about one."""


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "deploy" / "sticky" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RING, BY_NAME = example("ring_hash"), example("by_name")


def replica(number: int, port: int = 0) -> tuple[grpc.Server, int]:
    """A server that answers with its number, and the port that it has."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    who = grpc.unary_unary_rpc_method_handler(lambda request, context: b"%d" % number)
    tell = grpc.unary_stream_rpc_method_handler(lambda request, context: iter([b"%d" % number]))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("replica", {"Who": who, "Tell": tell})])
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, port


@pytest.fixture
def replicas() -> Iterator[list[tuple[grpc.Server, int]]]:
    started = [replica(number) for number in range(3)]
    yield started
    for server, _ in started:
        server.stop(None).wait()


def chosen(channel: grpc.Channel, key: str) -> int:
    kept = grpc.intercept_channel(channel, RING.Affine(key))
    who: bytes = kept.unary_unary("/replica/Who")(b"", timeout=BOUND)
    return int(who)


def addresses(replicas: list[tuple[grpc.Server, int]]) -> list[str]:
    return [f"127.0.0.1:{port}" for _, port in replicas]


def test_a_ring_sends_a_conversation_to_one_replica(
    replicas: list[tuple[grpc.Server, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY", "false")  # undone with what the example sets
    with RING.ring(addresses(replicas)) as mine, RING.ring(addresses(replicas[::-1])) as another:
        places = {key: chosen(mine, key) for key in KEYS}
        assert set(places.values()) == {0, 1, 2}
        assert {key: chosen(mine, key) for key in KEYS} == places
        assert {key: chosen(another, key) for key in KEYS} == places, "for every caller, and every order of its list"
        stream = grpc.intercept_channel(mine, RING.Affine(KEYS[0])).unary_stream("/replica/Tell")
        assert [int(who) for who in stream(b"", timeout=BOUND)] == [places[KEYS[0]]]


def test_a_ring_moves_only_what_is_gone_and_has_it_back(
    replicas: list[tuple[grpc.Server, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY", "false")
    with RING.ring(addresses(replicas)) as channel:
        places = {key: chosen(channel, key) for key in KEYS}
        server, port = replicas[1]
        server.stop(None).wait()
        without = {key: chosen(channel, key) for key in KEYS}
        assert 1 not in without.values()
        assert all(without[key] == place for key, place in places.items() if place != 1)
        replicas[1] = replica(1, port)
        until = time.monotonic() + BOUND
        while (again := {key: chosen(channel, key) for key in KEYS}) != places and time.monotonic() < until:
            time.sleep(0.1)
        assert again == places


def test_names_choose_alike_for_all_callers_and_move_only_what_they_must() -> None:
    names = [f"vflow-{number}.vflow:50051" for number in range(3)]
    places = {key: BY_NAME.replica_of(key, names) for key in KEYS}
    assert min(Counter(places[key] for key in KEYS).values()) > len(KEYS) / 6
    assert {key: BY_NAME.replica_of(key, names[::-1]) for key in KEYS} == places
    fewer = {key: BY_NAME.replica_of(key, names[:2]) for key in KEYS}
    assert all(fewer[key] == place for key, place in places.items() if place != names[2])
