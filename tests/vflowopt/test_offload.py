"""An offloaded cache is restored exactly, from memory and from a file; damaged files are refused."""

from pathlib import Path

import pytest
import torch

from tests.vflowopt.generation import Chat, picture
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import OffloadedCache, OffloadError, offload, restore

STRATEGY = Strategy.from_budget(0.1, 6, (0.12, 0.9), grid=3.0)


def test_a_offloaded_conversation_goes_on_like_an_undisturbed_one(runtime: Runtime, tmp_path: Path) -> None:
    undisturbed, offloaded, filed = (Chat(runtime, STRATEGY) for _ in range(3))
    for chat in (undisturbed, offloaded, filed):
        chat.ask([picture(100, 70, 1), "first"], 5)
    used = runtime.pool.bytes_used
    memory = offload(offloaded.sequence)
    offload(filed.sequence).save(tmp_path / "cache.safetensors")
    assert runtime.pool.bytes_used == used // 3
    assert memory.nbytes > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.safetensors"]
    restore(offloaded.sequence, memory)
    restore(filed.sequence, OffloadedCache.load(tmp_path / "cache.safetensors"))
    expected = undisturbed.ask(["second"], 6)
    for chat in (offloaded, filed):
        assert chat.ask(["second"], 6) == expected
        for one, other in zip(chat.logits, undisturbed.logits, strict=True):
            assert torch.equal(one, other)
    for chat in (undisturbed, offloaded, filed):
        chat.sequence.release()


def test_a_file_that_cannot_be_written_leaves_nothing(runtime: Runtime, tmp_path: Path) -> None:
    chat = Chat(runtime, STRATEGY)
    chat.ask(["hello"], 3)
    offloaded = offload(chat.sequence)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        offloaded.save(tmp_path / "taken")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_what_is_not_of_this_conversation_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    chat, other = Chat(runtime, STRATEGY), Chat(runtime, Strategy.full())
    chat.ask(["hello"], 3)
    other.ask(["hello"], 3)
    offloaded = offload(chat.sequence)
    for sequence in (other.sequence, runtime.start(STRATEGY)):
        with pytest.raises(OffloadError, match="not of this sequence"):
            restore(sequence, offloaded)
    offloaded.save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    for damaged in (b"", b"not a cache", whole[: len(whole) // 2]):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(OffloadError, match="rebuild it"):
            OffloadedCache.load(tmp_path / "damaged")
    with pytest.raises(OffloadError):
        OffloadedCache.load(tmp_path / "missing")
    other.sequence.release()
