"""What the last owner of a page left in it reaches nobody, not even as a number that attention masks."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.vflowopt.generation import Chat, picture
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.cache import PagePool
from vflowopt.runtime.model_runner import Runtime


def poison(pool: PagePool) -> None:
    """Have a number that spoils every sum it enters in all pages, which nobody may hold."""
    assert not pool.bytes_used
    pool.keys.fill_(math.nan)
    pool.values.fill_(math.nan)


@pytest.fixture(params=["kernel", "stock attention"])
def own_runtime(request: pytest.FixtureRequest, plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A runtime of its own, with the kernel where there is a compiler, and without."""
    if request.param == "stock attention":
        monkeypatch.setenv("CC", "no-such-compiler")
    return Runtime.load(plain_folder, kv_budget=32 << 20)


def logits_of(runtime: Runtime) -> Iterator[torch.Tensor]:
    """The logits behind the answers of three sequences of unequal lengths, alone and then together."""
    chats = [Chat(runtime, strategy) for strategy in (Strategy.full(), Strategy.preset(0.25, 6), Strategy.full())]
    for index, chat in enumerate(chats):
        chat.ask([picture(56 + 20 * index, 80, index), "go" * (9 * index + 1)], 3)
        yield from chat.logits
    sequences = [chat.sequence for chat in chats]
    for token in (70, 71):
        yield from runtime.decode(sequences, [token] * len(sequences))
    for sequence in sequences:
        sequence.release()


def test_answers_do_not_depend_on_what_pages_held_before(own_runtime: Runtime) -> None:
    first = list(logits_of(own_runtime))
    poison(own_runtime.pool)
    again = list(logits_of(own_runtime))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
