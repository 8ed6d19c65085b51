"""The log and how much of it is cached, when the end of it is taken back."""

import pytest

from tests.vflowopt.talk import Talk, picture
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import park, unpark
from vflowopt.runtime.sequence import tokens_per_stage

STRATEGY = Strategy.from_budget(0.1, 6, (0.12, 0.9), grid=3.0)


@pytest.fixture
def talk(runtime: Runtime) -> Talk:
    talk = Talk(runtime, STRATEGY)
    talk.ask([picture(100, 70, 1), "first"], 5)
    return talk


def lengths(talk: Talk) -> tuple[int, ...]:
    """Tokens that a cache of the whole log holds in each stage."""
    return tuple(tokens_per_stage(talk.conversation.log, len(talk.conversation.cache.stages)))


def test_truncating_forgets_the_end_of_the_log_and_of_the_cache(talk: Talk, runtime: Runtime) -> None:
    conversation, log = talk.conversation, list(talk.conversation.log)
    conversation.truncate(len(log))
    assert conversation.cached.items == len(log) - 1, "what was not cached before is not cached now"
    conversation.truncate(len(log) - 3)
    assert conversation.log == log[:-3] and conversation.cache.lengths == lengths(talk)
    fresh = Talk(runtime, STRATEGY)
    fresh.conversation.log = log[:-3]
    one, other = (runtime.extend(each.conversation, log[-3:]) for each in (talk, fresh))
    assert one is not None and other is not None and int(one.argmax()) == int(other.argmax())
    for each in (talk, fresh):
        each.conversation.release()


@pytest.mark.parametrize("parked", [True, False], ids=["brought back", "rebuilt"])
def test_a_rollback_keeps_a_cache_that_came_back_since(talk: Talk, runtime: Runtime, parked: bool) -> None:
    conversation, turns = talk.conversation, talk.turns
    aside = park(conversation)
    mark = conversation.checkpoint()
    if parked:
        unpark(conversation, aside)
    talk.ask(["something else", picture(60, 60, 8)], 4)
    conversation.rollback(mark)
    talk.turns = turns
    assert conversation.cached.items == len(conversation.log) and conversation.cache.lengths == lengths(talk)
    undisturbed = Talk(runtime, STRATEGY)
    undisturbed.ask([picture(100, 70, 1), "first"], 5)
    assert talk.ask(["second"], 6) == undisturbed.ask(["second"], 6)
    for each in (talk, undisturbed):
        each.conversation.release()
    runtime.pool.check_integrity([])
