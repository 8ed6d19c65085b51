"""Whose picture is decoded next, and who may have decoded pictures in memory."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from vflow_server.images.decoded_memory import DecodedMemory
from vflow_server.images.decoding_queue import DecodingQueue, Job, UsedTime
from vflow_server.rpc.errors import CapacityExhausted


def job(tenant: str, nbytes: int = 1000) -> Job:
    return Job(tenant, bytes(nbytes), 1_000_000)


def order(queue: DecodingQueue, running: Counter[str] | None = None) -> list[Job]:
    """The jobs in the order in which they would be decoded if none of them took any time."""
    found = []
    while (first := queue.first(running or Counter())) is not None:
        queue.remove(first)
        found.append(first)
    return found


def test_who_has_used_least_comes_first() -> None:
    async def check() -> None:
        used = UsedTime()
        queue = DecodingQueue(used, most=9, most_bytes=1 << 30)
        used.add("slow", 2.0)
        slow, quick, new, second = jobs = [job("slow"), job("quick"), job("new"), job("quick")]
        used.add("quick", 0.1)
        for each in jobs:
            queue.put(each)
        assert order(queue) == [new, quick, second, slow]

    asyncio.run(check())


def test_a_tenant_that_is_served_lets_others_go_first() -> None:
    async def check() -> None:
        used = UsedTime()
        queue = DecodingQueue(used, most=9, most_bytes=1 << 30)
        used.add("waits", 1.0)
        served, waits = job("served"), job("waits")
        queue.put(served)
        queue.put(waits)
        assert order(queue, Counter({"served": 1})) == [waits, served]

    asyncio.run(check())


def test_among_equals_a_small_file_comes_before_a_large_one() -> None:
    async def check() -> None:
        queue = DecodingQueue(UsedTime(), most=9, most_bytes=1 << 30)
        large, small = job("one", 10_000_000), job("two")
        queue.put(large)
        queue.put(small)
        assert order(queue) == [small, large]

    asyncio.run(check())


@pytest.mark.parametrize(("most", "most_bytes"), [(4, 1 << 30), (400, 4_000)])
def test_a_full_queue_refuses_the_latest_of_who_has_most(most: int, most_bytes: int) -> None:
    async def check() -> None:
        queue = DecodingQueue(UsedTime(), most=most, most_bytes=most_bytes)
        many = [job("many") for _ in range(5)]
        for each in many:
            queue.put(each)
        assert isinstance(many[4].result.exception(), CapacityExhausted), "it has filled the queue alone"
        one, two = job("one"), job("two")
        queue.put(one)
        queue.put(two)
        assert [each.result.done() for each in many] == [False, False, True, True, True]
        assert not one.result.done() and not two.result.done()
        for each in many[2:4]:
            assert isinstance(each.result.exception(), CapacityExhausted)

    asyncio.run(check())


def test_who_uses_little_memory_may_have_more_where_there_is_none_left() -> None:
    held = np.zeros(400, np.uint8)
    memory = DecodedMemory(1600, lambda tenant: 400 if tenant == "neighbour" else 0)
    memory.count("neighbour", held)  # for its next requests; none uses it now
    memory.reserve("hostile", 1200)
    with pytest.raises(CapacityExhausted):
        memory.reserve("hostile", 1)
    memory.reserve("neighbour", 100)
    with pytest.raises(CapacityExhausted):
        memory.reserve("neighbour", 1)
    for number in range(3):
        memory.reserve(f"new{number}", 100)
    with pytest.raises(CapacityExhausted):
        memory.reserve("new3", 1)
    assert memory.total == 2000
    del held
    memory.give_back("hostile", 1200)
    assert memory.total == 400
