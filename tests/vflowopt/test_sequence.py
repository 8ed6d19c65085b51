"""The log and how much of it is cached, when the end of it is taken back."""

import pytest

from tests.vflowopt.generation import Chat, picture
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import offload, restore
from vflowopt.runtime.sequence import tokens_per_stage

STRATEGY = Strategy.from_budget(0.1, 6, (0.12, 0.9), grid=3.0)


@pytest.fixture
def chat(runtime: Runtime) -> Chat:
    chat = Chat(runtime, STRATEGY)
    chat.ask([picture(100, 70, 1), "first"], 5)
    return chat


def lengths(chat: Chat) -> tuple[int, ...]:
    """Tokens that a cache of the whole log holds in each stage."""
    return tuple(tokens_per_stage(chat.sequence.log, len(chat.sequence.cache.stages)))


def test_truncating_forgets_the_end_of_the_log_and_of_the_cache(chat: Chat, runtime: Runtime) -> None:
    sequence, log = chat.sequence, list(chat.sequence.log)
    sequence.truncate(len(log))
    assert sequence.cached.items == len(log) - 1, "what was not cached before is not cached now"
    sequence.truncate(len(log) - 3)
    assert sequence.log == log[:-3] and sequence.cache.lengths == lengths(chat)
    fresh = Chat(runtime, STRATEGY)
    fresh.sequence.log = log[:-3]
    one, other = (runtime.extend(each.sequence, log[-3:]) for each in (chat, fresh))
    assert one is not None and other is not None and int(one.argmax()) == int(other.argmax())
    for each in (chat, fresh):
        each.sequence.release()


@pytest.mark.parametrize("offloaded", [True, False], ids=["brought back", "rebuilt"])
def test_a_rollback_keeps_a_cache_that_came_back_since(chat: Chat, runtime: Runtime, offloaded: bool) -> None:
    sequence, turns = chat.sequence, chat.turns
    aside = offload(sequence)
    mark = sequence.checkpoint()
    if offloaded:
        restore(sequence, aside)
    chat.ask(["something else", picture(60, 60, 8)], 4)
    sequence.rollback(mark)
    chat.turns = turns
    assert sequence.cached.items == len(sequence.log) and sequence.cache.lengths == lengths(chat)
    undisturbed = Chat(runtime, STRATEGY)
    undisturbed.ask([picture(100, 70, 1), "first"], 5)
    assert chat.ask(["second"], 6) == undisturbed.ask(["second"], 6)
    for each in (chat, undisturbed):
        each.sequence.release()
    runtime.pool.check_integrity([])
