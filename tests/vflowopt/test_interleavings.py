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
from vflowopt.kernels.decode_kernel import build_decode_kernel
from vflowopt.media.picture import Picture
from vflowopt.runtime.attention import SdpaBackend
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
        folder: where caches are offloaded.
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
    return Bench(runtime, aside, images, tmp_path_factory.mktemp("offloaded"))


@dataclass(eq=False)
class Chat:
    """A sequence, with the log that it must have, now and at each of its checkpoints.

    There is a checkpoint before every change of the log.
    """

    kind: int
    sequence: Sequence
    log: list[Item] = field(default_factory=list)
    marks: list[tuple[Checkpoint, list[Item]]] = field(default_factory=list)
    offloaded: tuple[OffloadedCache, list[Item]] | None = None
    """A copy of the cache, and what it covers of the log."""

    def has_room(self, items: list[Item]) -> bool:
        """Whether the sequence may grow by ``items``."""
        return sum(map(tokens_in, [*self.log, *items])) <= TOKENS

    def append(self, items: list[Item]) -> None:
        """Append to the log, if there is room."""
        if self.has_room(items):
            self.record(self.sequence.checkpoint(), items)
            self.sequence.log.extend(items)

    def record(self, before: Checkpoint, items: list[Item]) -> None:
        """Record that ``items`` were appended."""
        self.marks.append((before, self.log))
        self.log = [*self.log, *items]

    def begins_with(self, items: list[Item]) -> bool:
        """Whether ``items`` are a prefix of the log."""
        return self.log[: len(items)] == items


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
        assert isinstance(self.runtime.backend, SdpaBackend)
        model = self.runtime.model
        kernel = build_decode_kernel(model.head_dim, model.decoder.config.num_attention_heads, model.heads, PAGE_SIZE)
        self.runtime.backend = SdpaBackend(self.runtime.pool, kernel)
        self.chats: list[Chat] = []

    def chat(self, place: int) -> Chat:
        return self.chats[place % len(self.chats)]

    def state(self) -> list[object]:
        """Everything that a refused operation must leave as it was."""
        state: list[object] = [self.runtime.pool.free_pages]
        for each in self.chats:
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

    def run(self, chats: list[Chat], limits: list[int | None]) -> None:
        """Run what is not cached yet, in one batch; where pages run short, others are preempted."""
        batch = [(each, limit) for each, limit in zip(chats, limits, strict=True) if each.sequence.pending_tokens]
        sequences = [each.sequence for each, _ in batch]
        if batch and not self.attempt(lambda: self.runtime.advance(sequences, [limit for _, limit in batch])):
            others = [each for each in self.chats if each not in chats]
            for each in others or self.chats:
                each.sequence.release()

    @precondition(lambda self: len(self.chats) < CONVERSATIONS)
    @rule(kind=st.integers(0, len(STRATEGIES) - 1), items=st.lists(token, min_size=1, max_size=9))
    def start(self, kind: int, items: list[Item]) -> None:
        new = Chat(kind, self.runtime.start(STRATEGIES[kind]))
        new.append(items)
        self.chats.append(new)
        self.run([new], [None])

    @precondition(lambda self: self.chats)
    @rule(place=places, which=st.integers(0, 1), limit=limits)
    def show(self, place: int, which: int, limit: int | None) -> None:
        chat = self.chat(place)
        chat.append([self.bench.images[chat.kind][which]])
        self.run([chat], [limit])

    @precondition(lambda self: self.chats)
    @rule(place=places, items=st.lists(token, min_size=1, max_size=12), limit=limits)
    def append(self, place: int, items: list[Item], limit: int | None) -> None:
        self.chat(place).append(items)
        self.run([self.chat(place)], [limit])

    @precondition(lambda self: self.chats)
    @rule(chosen=st.sets(places, min_size=2), items=st.lists(token, min_size=1, max_size=6), limit=limits)
    def say_together(self, chosen: set[int], items: list[Item], limit: int | None) -> None:
        """The same to several in one batch; those that are behind read a chunk of what they have not read yet."""
        chats = [chat for place, chat in enumerate(self.chats) if place in chosen]
        for chat in chats:
            chat.append(items)
        self.run(chats, [limit] * len(chats))

    @precondition(lambda self: self.chats)
    @rule(place=places, items=st.lists(token, min_size=1, max_size=12), image=st.booleans())
    def extend_or_nothing(self, place: int, items: list[Item], image: bool) -> None:
        chat = self.chat(place)
        items = [*items, *self.bench.images[chat.kind][:image]]
        before = chat.sequence.checkpoint()
        if chat.has_room(items) and self.attempt(lambda: self.runtime.extend(chat.sequence, items)):
            chat.record(before, items)

    @precondition(lambda self: self.chats)
    @rule(chosen=st.sets(places, min_size=1), next_token=token)
    def decode_or_nothing(self, chosen: set[int], next_token: int) -> None:
        chats = [chat for place, chat in enumerate(self.chats) if place in chosen and chat.has_room([next_token])]
        sequences = [each.sequence for each in chats]
        before = [each.checkpoint() for each in sequences]
        if chats and self.attempt(lambda: self.runtime.decode(sequences, [next_token] * len(chats))):
            for chat, checkpoint in zip(chats, before, strict=True):
                chat.record(checkpoint, [next_token])

    @precondition(lambda self: any(each.marks for each in self.chats))
    @rule(place=places, which=st.integers(1, 5))
    def roll_back(self, place: int, which: int) -> None:
        marked = [each for each in self.chats if each.marks]
        chat = marked[place % len(marked)]
        which = max(len(chat.marks) - which, 0)
        checkpoint, chat.log = chat.marks[which]
        chat.sequence.rollback(checkpoint)
        del chat.marks[which:]
        if chat.offloaded is not None and not chat.begins_with(chat.offloaded[1]):
            chat.offloaded = None

    @precondition(lambda self: 0 < len(self.chats) < CONVERSATIONS)
    @rule(place=places)
    def fork(self, place: int) -> None:
        chat = self.chat(place)
        self.chats.append(Chat(chat.kind, chat.sequence.fork(), chat.log))

    @precondition(lambda self: 0 < len(self.chats) < CONVERSATIONS)
    @rule(place=places, items=st.lists(token, min_size=1, max_size=5))
    def open_with_a_shared_prefix(self, place: int, items: list[Item]) -> None:
        prefix = self.chat(place)
        new = Chat(prefix.kind, self.runtime.start(STRATEGIES[prefix.kind]))
        new.append(prefix.log)
        new.append(items)
        new.sequence.share(prefix.sequence)
        self.chats.append(new)
        self.run([new], [None])

    @precondition(lambda self: len(self.chats) > 1)
    @rule(place=places, other=places)
    def share_after_all(self, place: int, other: int) -> None:
        """Give up an own cache for one of the same beginning."""
        chat, prefix = self.chat(place), self.chat(other)
        if chat is not prefix and chat.kind == prefix.kind and chat.begins_with(prefix.log):
            chat.sequence.share(prefix.sequence)

    @precondition(lambda self: any(each.sequence.resident for each in self.chats))
    @rule(place=places, to_file=st.booleans())
    def offload(self, place: int, to_file: bool) -> None:
        resident = [each for each in self.chats if each.sequence.resident]
        self.offload_one(resident[place % len(resident)], to_file)

    def offload_one(self, chat: Chat, to_file: bool = False) -> None:
        offloaded = offload(chat.sequence)
        if to_file:
            offloaded.save(self.bench.folder / "cache")
            offloaded = OffloadedCache.load(self.bench.folder / "cache")
        covered = offloaded.cached.items + (offloaded.cached.offset > 0)
        chat.offloaded = offloaded, chat.log[:covered]
        assert not chat.sequence.cache.owned_pages()

    @precondition(lambda self: any(each.offloaded is not None for each in self.chats))
    @rule(place=places)
    def restore(self, place: int) -> None:
        offloaded = [each for each in self.chats if each.offloaded is not None]
        self.restore_one(offloaded[place % len(offloaded)])

    def restore_one(self, chat: Chat) -> bool:
        """Restore what is offloaded, unless it was rebuilt meanwhile; False where pages run short."""
        if chat.offloaded is None or chat.sequence.resident:
            return True
        offloaded, _ = chat.offloaded
        return self.attempt(lambda: restore(chat.sequence, offloaded))

    @precondition(lambda self: self.chats)
    @rule(place=places)
    def release(self, place: int) -> None:
        self.chat(place).sequence.release()

    @precondition(lambda self: self.chats)
    @rule(place=places)
    def delete(self, place: int) -> None:
        chat = self.chat(place)
        chat.sequence.release()
        self.chats.remove(chat)

    @invariant()
    def every_page_is_free_or_owned(self) -> None:
        self.runtime.pool.check_integrity([each.sequence.cache for each in self.chats])

    @invariant()
    def logs_and_lengths_are_as_said(self) -> None:
        for chat in self.chats:
            sequence, cached = chat.sequence, chat.sequence.cached
            assert sequence.log == chat.log
            lengths = [0] * len(sequence.cache.stages)
            for index, item in enumerate(chat.log[: cached.items + 1]):
                for stage in range(len(lengths)):
                    stages = item.last_stages if isinstance(item, CompressedImage) else torch.tensor([len(lengths)])
                    present = stages if index < cached.items else stages[: cached.offset]
                    lengths[stage] += int((present >= stage).sum())
            assert sequence.cache.lengths == tuple(lengths)

    def teardown(self) -> None:
        """Every remaining sequence goes on like a sequence with the same log that nothing ever happened to."""
        for chat in self.chats:
            fresh = self.bench.aside.start(STRATEGIES[chat.kind])
            fresh.log.extend(chat.log)
            for next_token in (65, 66, 67):
                chat.sequence.log.append(next_token)
                answer = self.run_among_others(chat)
                expected = self.bench.aside.extend(fresh, [next_token])
                assert answer is not None and expected is not None
                torch.testing.assert_close(answer, expected, atol=1e-4, rtol=0)
            fresh.release()
        for chat in self.chats:
            chat.sequence.release()
        self.runtime.pool.check_integrity([])

    def run_among_others(self, chat: Chat) -> torch.Tensor | None:
        """Run ``chat``; where pages run short, others are offloaded, and so keep what they hold."""
        answers: list[torch.Tensor | None] = []
        while not (
            self.restore_one(chat) and self.attempt(lambda: answers.extend(self.runtime.advance([chat.sequence])))
        ):
            self.offload_one(next(each for each in self.chats if each is not chat and each.sequence.resident))
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
