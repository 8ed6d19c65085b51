"""The log and how much of it is cached, when the end of it is taken back."""

import pytest

from tests.vflowopt.talk import Talk, picture
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import offload, restore
from vflowopt.runtime.sequence import tokens_per_stage

STRATEGY = Strategy.from_budget(0.1, 6, (0.12, 0.9), grid=3.0)


@pytest.fixture
def talk(runtime: Runtime) -> Talk:
    talk = Talk(runtime, STRATEGY)
    talk.ask([picture(100, 70, 1), "first"], 5)
    return talk


def lengths(talk: Talk) -> tuple[int, ...]:
    """Tokens that a cache of the whole log holds in each stage."""
    return tuple(tokens_per_stage(talk.sequence.log, len(talk.sequence.cache.stages)))


def test_truncating_forgets_the_end_of_the_log_and_of_the_cache(talk: Talk, runtime: Runtime) -> None:
    sequence, log = talk.sequence, list(talk.sequence.log)
    sequence.truncate(len(log))
    assert sequence.cached.items == len(log) - 1, "what was not cached before is not cached now"
    sequence.truncate(len(log) - 3)
    assert sequence.log == log[:-3] and sequence.cache.lengths == lengths(talk)
    fresh = Talk(runtime, STRATEGY)
    fresh.sequence.log = log[:-3]
    one, other = (runtime.extend(each.sequence, log[-3:]) for each in (talk, fresh))
    assert one is not None and other is not None and int(one.argmax()) == int(other.argmax())
    for each in (talk, fresh):
        each.sequence.release()


@pytest.mark.parametrize("parked", [True, False], ids=["brought back", "rebuilt"])
def test_a_rollback_keeps_a_cache_that_came_back_since(talk: Talk, runtime: Runtime, parked: bool) -> None:
    sequence, turns = talk.sequence, talk.turns
    aside = offload(sequence)
    mark = sequence.checkpoint()
    if parked:
        restore(sequence, aside)
    talk.ask(["something else", picture(60, 60, 8)], 4)
    sequence.rollback(mark)
    talk.turns = turns
    assert sequence.cached.items == len(sequence.log) and sequence.cache.lengths == lengths(talk)
    undisturbed = Talk(runtime, STRATEGY)
    undisturbed.ask([picture(100, 70, 1), "first"], 5)
    assert talk.ask(["second"], 6) == undisturbed.ask(["second"], 6)
    for each in (talk, undisturbed):
        each.sequence.release()
    runtime.pool.check_integrity([])
