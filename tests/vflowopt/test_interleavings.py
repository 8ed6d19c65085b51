"""Whatever is done to sequences, and in whatever order: no page is lost, and every answer is a fresh one's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.vflowopt.generation import picture
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.cache import PagePool, PoolExhausted
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import OffloadedCache, offload, restore
from vflowopt.runtime.sequence import Checkpoint, Item, Sequence, tokens_in

STRATEGIES = (
    Strategy.full(),
    Strategy.from_budget(0.1, 6, (0.12, 0.9), threshold=1.0, alpha=0.1, grid=3.0),
    Strategy.from_budget(0.4, 6, (0.5, 0.9), grid=2.0, positions="renumbered"),
    Strategy((0, 1, 3, 5), (0.9, 0.6, 0.5, 0.3)),
)
CONVERSATIONS = 5
TOKENS = 110
"""Most first-stage tokens of a sequence."""
PAGE_SIZE = 4
PAGES = 180
"""Room for the longest sequence, but for a few of them only."""


@dataclass(frozen=True)
class Bench:
    """What all sequences share.

    Attributes:
        runtime: what is tested; each sequence gives it a small pool.
        aside: another one, with pages of another size, for sequences that nothing happens to.
        images: per strategy, its pictures.
        folder: where caches are parked.
    """

    runtime: Runtime
    aside: Runtime
    images: tuple[tuple[CompressedImage, ...], ...]
    folder: Path


@pytest.fixture(scope="module")
def bench(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    runtime, aside = (Runtime.load(plain_folder, kv_budget=8 << 20) for _ in range(2))
    shown = [Picture.from_pixels(picture(56, 56, 0)), Picture.from_pixels(picture(50, 90, 1))]
    images = tuple(tuple(aside.compress(shown, strategy)) for strategy in STRATEGIES)
    return Bench(runtime, aside, images, tmp_path_factory.mktemp("parked"))


@dataclass(eq=False)
class Talk:
    """A sequence, and what it must be: what was said in it, and what had been said at its checkpoints.

    There is a checkpoint before everything that is said.
    """

    kind: int
    sequence: Sequence
    said: list[Item] = field(default_factory=list)
    marks: list[tuple[Checkpoint, list[Item]]] = field(default_factory=list)
    parked: tuple[OffloadedCache, list[Item]] | None = None
    """A copy of the cache, and what it covers of the log."""

    def has_room(self, items: list[Item]) -> bool:
        """Whether the sequence may grow by ``items``."""
        return sum(map(tokens_in, [*self.said, *items])) <= TOKENS

    def say(self, items: list[Item]) -> None:
        """Append to the log, if there is room."""
        if self.has_room(items):
            self.note(self.sequence.checkpoint(), items)
            self.sequence.log.extend(items)

    def note(self, before: Checkpoint, items: list[Item]) -> None:
        """Note that ``items`` were said."""
        self.marks.append((before, self.said))
        self.said = [*self.said, *items]

    def begins_with(self, items: list[Item]) -> bool:
        """Whether ``items`` are the beginning of what was said."""
        return self.said[: len(items)] == items


places = st.integers(0, CONVERSATIONS - 1)
limits = st.none() | st.integers(1, 9)
token = st.integers(0, 255)


class Interleaving(RuleBasedStateMachine):
    """One sequence of operations on a few sequences in a small pool."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench
        self.runtime = bench.runtime
        # A fresh one: what a failing sequence leaves behind is nothing to the next.
        self.runtime.pool = PagePool(
            PAGES * PAGE_SIZE * self.runtime.bytes_per_token(),
            page_size=PAGE_SIZE,
            heads=self.runtime.model.heads,
            head_dim=self.runtime.model.head_dim,
            dtype=self.runtime.model.dtype,
            device=self.runtime.model.device,
        )
        self.talks: list[Talk] = []

    def talk(self, place: int) -> Talk:
        return self.talks[place % len(self.talks)]

    def state(self) -> list[object]:
        """Everything that a refused operation must leave as it was."""
        state: list[object] = [self.runtime.pool.free_pages]
        for each in self.talks:
            cache = each.sequence.cache
            state += [list(each.sequence.log), each.sequence.cached, cache.lengths, sorted(cache.owned_pages())]
        return state

    def attempt(self, operation: Callable[[], object]) -> bool:
        """Do what may need more pages than are free, and must then change nothing."""
        before = self.state()
        try:
            operation()
        except PoolExhausted:
            assert self.state() == before
            return False
        return True

    def run(self, talks: list[Talk], limits: list[int | None]) -> None:
        """Run what is said and not cached yet, in one batch; where pages run short, others are preempted."""
        batch = [(each, limit) for each, limit in zip(talks, limits, strict=True) if each.sequence.pending_tokens]
        sequences = [each.sequence for each, _ in batch]
        if batch and not self.attempt(lambda: self.runtime.advance(sequences, [limit for _, limit in batch])):
            others = [each for each in self.talks if each not in talks]
            for each in others or self.talks:
                each.sequence.release()

    @precondition(lambda self: len(self.talks) < CONVERSATIONS)
    @rule(kind=st.integers(0, len(STRATEGIES) - 1), items=st.lists(token, min_size=1, max_size=9))
    def start(self, kind: int, items: list[Item]) -> None:
        new = Talk(kind, self.runtime.start(STRATEGIES[kind]))
        new.say(items)
        self.talks.append(new)
        self.run([new], [None])

    @precondition(lambda self: self.talks)
    @rule(place=places, which=st.integers(0, 1), limit=limits)
    def show(self, place: int, which: int, limit: int | None) -> None:
        talk = self.talk(place)
        talk.say([self.bench.images[talk.kind][which]])
        self.run([talk], [limit])

    @precondition(lambda self: self.talks)
    @rule(place=places, items=st.lists(token, min_size=1, max_size=12), limit=limits)
    def say(self, place: int, items: list[Item], limit: int | None) -> None:
        self.talk(place).say(items)
        self.run([self.talk(place)], [limit])

    @precondition(lambda self: self.talks)
    @rule(chosen=st.sets(places, min_size=2), items=st.lists(token, min_size=1, max_size=6), limit=limits)
    def say_together(self, chosen: set[int], items: list[Item], limit: int | None) -> None:
        """The same to several in one batch; those that are behind read a chunk of what they have not read yet."""
        talks = [talk for place, talk in enumerate(self.talks) if place in chosen]
        for talk in talks:
            talk.say(items)
        self.run(talks, [limit] * len(talks))

    @precondition(lambda self: self.talks)
    @rule(place=places, items=st.lists(token, min_size=1, max_size=12), image=st.booleans())
    def extend_or_nothing(self, place: int, items: list[Item], image: bool) -> None:
        talk = self.talk(place)
        items = [*items, *self.bench.images[talk.kind][:image]]
        before = talk.sequence.checkpoint()
        if talk.has_room(items) and self.attempt(lambda: self.runtime.extend(talk.sequence, items)):
            talk.note(before, items)

    @precondition(lambda self: self.talks)
    @rule(chosen=st.sets(places, min_size=1), said=token)
    def decode_or_nothing(self, chosen: set[int], said: int) -> None:
        talks = [talk for place, talk in enumerate(self.talks) if place in chosen and talk.has_room([said])]
        sequences = [each.sequence for each in talks]
        before = [each.checkpoint() for each in sequences]
        if talks and self.attempt(lambda: self.runtime.decode(sequences, [said] * len(talks))):
            for talk, checkpoint in zip(talks, before, strict=True):
                talk.note(checkpoint, [said])

    @precondition(lambda self: any(each.marks for each in self.talks))
    @rule(place=places, which=st.integers(1, 5))
    def roll_back(self, place: int, which: int) -> None:
        marked = [each for each in self.talks if each.marks]
        talk = marked[place % len(marked)]
        which = max(len(talk.marks) - which, 0)
        checkpoint, talk.said = talk.marks[which]
        talk.sequence.rollback(checkpoint)
        del talk.marks[which:]
        if talk.parked is not None and not talk.begins_with(talk.parked[1]):
            talk.parked = None

    @precondition(lambda self: 0 < len(self.talks) < CONVERSATIONS)
    @rule(place=places)
    def fork(self, place: int) -> None:
        talk = self.talk(place)
        self.talks.append(Talk(talk.kind, talk.sequence.fork(), talk.said))

    @precondition(lambda self: 0 < len(self.talks) < CONVERSATIONS)
    @rule(place=places, items=st.lists(token, min_size=1, max_size=5))
    def open_with_a_shared_prefix(self, place: int, items: list[Item]) -> None:
        prefix = self.talk(place)
        new = Talk(prefix.kind, self.runtime.start(STRATEGIES[prefix.kind]))
        new.say(prefix.said)
        new.say(items)
        new.sequence.share(prefix.sequence)
        self.talks.append(new)
        self.run([new], [None])

    @precondition(lambda self: len(self.talks) > 1)
    @rule(place=places, other=places)
    def share_after_all(self, place: int, other: int) -> None:
        """Give up an own cache for one of the same beginning."""
        talk, prefix = self.talk(place), self.talk(other)
        if talk is not prefix and talk.kind == prefix.kind and talk.begins_with(prefix.said):
            talk.sequence.share(prefix.sequence)

    @precondition(lambda self: any(each.sequence.resident for each in self.talks))
    @rule(place=places, to_file=st.booleans())
    def offload(self, place: int, to_file: bool) -> None:
        resident = [each for each in self.talks if each.sequence.resident]
        self.park_one(resident[place % len(resident)], to_file)

    def park_one(self, talk: Talk, to_file: bool = False) -> None:
        parked = offload(talk.sequence)
        if to_file:
            parked.save(self.bench.folder / "cache")
            parked = OffloadedCache.load(self.bench.folder / "cache")
        covered = parked.cached.items + (parked.cached.offset > 0)
        talk.parked = parked, talk.said[:covered]
        assert not talk.sequence.cache.owned_pages()

    @precondition(lambda self: any(each.parked is not None for each in self.talks))
    @rule(place=places)
    def restore(self, place: int) -> None:
        parked = [each for each in self.talks if each.parked is not None]
        self.unpark_one(parked[place % len(parked)])

    def unpark_one(self, talk: Talk) -> bool:
        """Bring back what is parked, unless it was rebuilt meanwhile; False where pages run short."""
        if talk.parked is None or talk.sequence.resident:
            return True
        parked, _ = talk.parked
        return self.attempt(lambda: restore(talk.sequence, parked))

    @precondition(lambda self: self.talks)
    @rule(place=places)
    def release(self, place: int) -> None:
        self.talk(place).sequence.release()

    @precondition(lambda self: self.talks)
    @rule(place=places)
    def delete(self, place: int) -> None:
        talk = self.talk(place)
        talk.sequence.release()
        self.talks.remove(talk)

    @invariant()
    def every_page_is_free_or_owned(self) -> None:
        self.runtime.pool.check_integrity([each.sequence.cache for each in self.talks])

    @invariant()
    def logs_and_lengths_are_as_said(self) -> None:
        for talk in self.talks:
            sequence, cached = talk.sequence, talk.sequence.cached
            assert sequence.log == talk.said
            lengths = [0] * len(sequence.cache.stages)
            for index, item in enumerate(talk.said[: cached.items + 1]):
                for stage in range(len(lengths)):
                    stages = item.last_stages if isinstance(item, CompressedImage) else torch.tensor([len(lengths)])
                    present = stages if index < cached.items else stages[: cached.offset]
                    lengths[stage] += int((present >= stage).sum())
            assert sequence.cache.lengths == tuple(lengths)

    def teardown(self) -> None:
        """Whoever is left goes on like a sequence with the same log that nothing ever happened to."""
        for talk in self.talks:
            fresh = self.bench.aside.start(STRATEGIES[talk.kind])
            fresh.log.extend(talk.said)
            for said in (65, 66, 67):
                talk.sequence.log.append(said)
                answer = self.run_among_others(talk)
                expected = self.bench.aside.extend(fresh, [said])
                assert answer is not None and expected is not None
                torch.testing.assert_close(answer, expected, atol=1e-4, rtol=0)
            fresh.release()
        for talk in self.talks:
            talk.sequence.release()
        self.runtime.pool.check_integrity([])

    def run_among_others(self, talk: Talk) -> torch.Tensor | None:
        """Run ``talk``; where pages run short, others are parked, and so keep what they hold."""
        answers: list[torch.Tensor | None] = []
        while not (
            self.unpark_one(talk) and self.attempt(lambda: answers.extend(self.runtime.advance([talk.sequence])))
        ):
            self.park_one(next(each for each in self.talks if each is not talk and each.sequence.resident))
        (answer,) = answers
        return answer


def interleave(bench: Bench, sequences: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: Interleaving(bench), settings=settings(max_examples=sequences, stateful_step_count=30, deadline=None)
    )


def test_any_interleaving_keeps_the_pool_and_the_answers(bench: Bench) -> None:
    interleave(bench, 200)


@pytest.mark.long
def test_many_interleavings_keep_the_pool_and_the_answers(bench: Bench) -> None:
    interleave(bench, 1000)
