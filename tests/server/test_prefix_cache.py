"""The prefix cache by itself: its tenants, its size, and the release of its pages."""

from collections.abc import Iterator

import pytest

from tests.server.drawing import noise
from vflow_server.kv.prefix_cache import PrefixCache
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Item, Sequence

FULL, OTHER = Strategy.full(), Strategy((0,), (0.5,))


@pytest.fixture
def prefixes(runtime: Runtime) -> Iterator[PrefixCache]:
    """A cache of two prefixes; after the test only their pages may be in use."""
    prefixes = PrefixCache(2)
    yield prefixes
    runtime.pool.check_integrity(prefixes.caches())
    prefixes.clear()
    runtime.pool.check_integrity([])


def put(prefixes: PrefixCache, runtime: Runtime, seed: int, tenant: str = "red") -> list[Item]:
    """Put a sequence that begins with a picture into the cache; its log."""
    sequence: Sequence = runtime.start(FULL)
    (image,) = runtime.compress([Picture.from_pixels(noise(40, 40, seed))], FULL)
    runtime.extend(sequence, [1, 2, image], want_logits=False)
    prefixes.put(tenant, sequence)
    sequence.release()
    return list(sequence.log)


def test_a_beginning_is_found_for_its_tenant_and_strategy_alone(prefixes: PrefixCache, runtime: Runtime) -> None:
    log = put(prefixes, runtime, 1)
    found = prefixes.find("red", FULL, [*log, 3])
    assert found is not None and found.log == log
    assert prefixes.find("blue", FULL, [*log, 3]) is None
    assert prefixes.find("red", OTHER, [*log, 3]) is None
    assert prefixes.find("red", FULL, [9, *log[1:], 3]) is None
    assert prefixes.find("red", FULL, log[:-1]) is None


def test_the_least_recently_used_goes_first(prefixes: PrefixCache, runtime: Runtime) -> None:
    first, second = put(prefixes, runtime, 1), put(prefixes, runtime, 2)
    assert prefixes.find("red", FULL, first)
    third = put(prefixes, runtime, 3)
    assert len(prefixes) == 2
    assert prefixes.find("red", FULL, second) is None
    assert prefixes.find("red", FULL, first) and prefixes.find("red", FULL, third)


def test_what_is_kept_twice_is_held_once(prefixes: PrefixCache, runtime: Runtime) -> None:
    put(prefixes, runtime, 1)
    held = runtime.pool.bytes_used
    put(prefixes, runtime, 1)
    assert runtime.pool.bytes_used == held and len(prefixes) == 1
