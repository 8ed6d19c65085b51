"""Decode steps with everything in fixed buffers; off a GPU the step is run where a graph would be replayed."""

import random
from collections import abc
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.vflowopt.generation import picture
from tests.vflowopt.interpreter import repaired_interpreter  # noqa: F401
from tests.vflowopt.varlen_stand_in import stand_in
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime import varlen_attention
from vflowopt.runtime.attention import SdpaBackend
from vflowopt.runtime.backend import Backend
from vflowopt.runtime.cuda_graph import SIZES, DecodeGraphs, DecodePlan, Rotary
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.ragged_attention import RaggedBackend
from vflowopt.runtime.sequence import CachedLength, Sequence
from vflowopt.runtime.varlen_attention import PageAccess, VarlenBackend

STRATEGIES = (
    Strategy.from_budget(0.1, 6, (0.12, 0.9), threshold=1.0, alpha=0.1, grid=3.0),
    Strategy.full(),
    Strategy((0, 1, 3, 5), (0.9, 0.6, 0.5, 0.3)),
)
BACKENDS = ("paged", "gathered", "sdpa", "triton")


def backend_of(runtime: Runtime, name: str) -> Backend:
    """A backend over the runtime's pool."""
    if name == "triton":
        return RaggedBackend(runtime.pool, runtime.model.decoder.config.num_attention_heads, splits=2)
    return SdpaBackend(runtime.pool) if name == "sdpa" else VarlenBackend(runtime.pool, cast(PageAccess, name))


def graphs(runtime: Runtime, backend: Backend) -> DecodeGraphs:
    def step(tokens: Tensor, rotary: Rotary, plan: DecodePlan) -> Tensor:
        hidden = runtime.model.decoder.embed_tokens(tokens)
        hidden = runtime.decoder.run(range(runtime.layers), hidden, rotary, plan)
        logits: Tensor = runtime.model.head(runtime.decoder.norm(hidden)).float()
        return logits

    return DecodeGraphs(runtime.pool, runtime.layers, rotary=runtime.decoder.rotary, step=step, backend=backend)


def sequences(runtime: Runtime) -> list[Sequence]:
    """Sequences of unequal strategies and lengths, cached but for their last token."""
    begun = []
    for index in range(6):
        strategy = STRATEGIES[index % len(STRATEGIES)]
        (image,) = runtime.compress([Picture.from_pixels(picture(56, 60 + 20 * index, index))], strategy)
        begun.append(runtime.start(strategy))
        runtime.extend(begun[-1], [*range(5 * index), image, *range(index + 1)])
    return begun


def decode(runtime: Runtime, graphs: DecodeGraphs, batch: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> Tensor:
    """What :meth:`Runtime.decode` does, by graphs."""
    for sequence in batch:
        sequence.cache.reserve([1] * len(sequence.cache.stages))
    logits = graphs.run([each.cache for each in batch], tokens, [sequence.cached.position for sequence in batch])
    for sequence, token in zip(batch, tokens, strict=True):
        sequence.log.append(token)
        sequence.cache.advance([1] * len(sequence.cache.stages))
        sequence.cached = CachedLength(len(sequence.log), 0, sequence.cached.position + 1)
    return logits


@pytest.mark.parametrize("name", BACKENDS)
def test_steps_equal_those_of_the_runtime(runtime: Runtime, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any sequences in any order, whatever happened to their caches between the steps."""
    monkeypatch.setattr(varlen_attention, "varlen_attn", stand_in())
    generator = random.Random(0)
    ours = sequences(runtime)
    theirs = [each.fork() for each in ours]
    replayed = graphs(runtime, backend_of(runtime, name))
    marks = [each.checkpoint() for each in ours]
    for step in range(8 if name == "triton" else 40):  # the interpreter is slow
        chosen = generator.sample(range(len(ours)), generator.randint(1, len(ours)))
        tokens = [generator.randrange(256) for _ in chosen]
        expected = runtime.decode([theirs[place] for place in chosen], tokens)
        answer = decode(runtime, replayed, [ours[place] for place in chosen], tokens)
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=0)
        place = generator.randrange(len(ours))
        if step % 4 == 0:  # the same lengths, other pages
            theirs[place].release()
            theirs[place] = ours[place].fork()
            ours[place], theirs[place] = theirs[place], ours[place]
        elif step % 4 == 1:
            for each in (ours[place], theirs[place]):
                each.rollback(marks[place])
        elif step % 4 == 2:
            ours[place].release()
            runtime.extend(ours[place], [7])
            runtime.extend(theirs[place], [7])
        runtime.pool.check_integrity([each.cache for each in (*ours, *theirs)])
    for each in (*ours, *theirs):
        each.release()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_writes_nothing_but_its_tokens(runtime: Runtime, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences in a graph for four: the row that is left over writes nowhere else."""
    monkeypatch.setattr(varlen_attention, "varlen_attn", stand_in())
    batch = sequences(runtime)
    for each in batch[3:]:
        each.release()
    del batch[3:]
    before, held = runtime.pool.keys.clone(), [each.cache.lengths for each in batch]
    for each in batch:
        each.cache.reserve([1] * len(each.cache.stages))
    graphs(runtime, backend_of(runtime, name)).run(
        [each.cache for each in batch], [1, 2, 3], [each.cached.position for each in batch]
    )
    assert [each.cache.lengths for each in batch] == held
    written = {
        int(slot)
        for each in batch
        for stage in each.cache.stages
        for slot in stage.slots(range(stage.length, stage.length + 1)).flatten()
    }
    changed = (runtime.pool.keys != before).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert set(changed) == written and len(written) == runtime.layers * len(batch)
    for each in batch:
        each.release()


@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_what_goes_wrong_in_one_conversation_stays_there(runtime: Runtime, name: str) -> None:
    batch = [runtime.start(Strategy.full()) for _ in range(3)]
    for index, sequence in enumerate(batch):
        runtime.extend(sequence, list(range(5 + 20 * index)))
    broken = torch.ones(len(runtime.pool.keys), dtype=torch.bool)
    for sequence in batch[1:]:
        stage = sequence.cache.stages[0]
        broken[stage.slots(range(runtime.pool.page_size * len(stage.block_table))).flatten()] = False
    runtime.pool.keys[broken] = runtime.pool.values[broken] = torch.nan
    logits = decode(runtime, graphs(runtime, backend_of(runtime, name)), batch, [1, 2, 3])
    assert logits.isfinite().all(1).tolist() == [False, True, True]
    for sequence in batch:
        sequence.release()


def test_few_words_beside_a_long_text_are_no_batch_for_copies(runtime: Runtime) -> None:
    short = [runtime.start(Strategy.full()) for _ in range(15)]
    long = runtime.start(Strategy.full())
    runtime.extend(long, [1] * 900)
    for sequence in short:
        runtime.extend(sequence, [1, 2, 3])
    caches = [each.cache for each in (*short, long)]
    assert graphs(runtime, SdpaBackend(runtime.pool)).suit(caches[:-1]) and graphs(
        runtime, SdpaBackend(runtime.pool)
    ).suit(caches[-1:])
    assert not graphs(runtime, SdpaBackend(runtime.pool)).suit(caches)
    assert graphs(runtime, backend_of(runtime, "paged")).suit(caches)
    assert not graphs(runtime, backend_of(runtime, "paged")).suit(caches[:1] * (SIZES[-1] + 1))
    for sequence in (*short, long):
        sequence.release()
