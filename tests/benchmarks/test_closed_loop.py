"""The closed loop, with a system that only counts."""

import threading
import time

import pytest

from benchmarks.chat import Chat, draw_chats
from benchmarks.closed_loop import hold
from benchmarks.conversation import Figures, percentile
from benchmarks.system import OpenChat, Reply, System


class CountingSystem(System):
    """Answers with two tokens and keeps count of what goes on at the same time."""

    name = "counting"

    def __init__(self, fail_at: int = -1) -> None:
        self.lock = threading.Lock()
        self.open_now = self.most_open = self.closed = self.answered = 0
        self.open_when_measured = -1
        self.fail_at = fail_at

    def open(self, chat: Chat) -> OpenChat:
        with self.lock:
            self.open_now += 1
            self.most_open = max(self.most_open, self.open_now)
        return CountingChat(self)

    def resident_bytes(self) -> int | None:
        self.open_when_measured = self.open_now
        return 1000

    def close(self) -> None:
        pass


class CountingChat(OpenChat):
    def __init__(self, system: CountingSystem) -> None:
        self.system = system
        self.turns = 0

    def say(self, question: str) -> Reply:
        with self.system.lock:
            self.system.answered += 1
            if self.system.answered == self.system.fail_at:
                raise RuntimeError("out of order")
        time.sleep(0.002)
        self.turns += 1
        return Reply(question, 2, 0.001 * self.turns, 100 * self.turns, 70)

    def close(self) -> None:
        with self.system.lock:
            self.system.open_now -= 1
            self.system.closed += 1


def chats(count: int, turns: int = 3) -> list[Chat]:
    return [Chat(bytes([number]), tuple(f"{number}.{turn}" for turn in range(turns))) for number in range(count)]


@pytest.mark.parametrize(("count", "at_once"), [(1, 1), (4, 1), (4, 4), (7, 3)])
def test_every_chat_is_held_once_and_so_many_at_once(count: int, at_once: int) -> None:
    system = CountingSystem()
    turns = []
    held = hold(system, chats(count), at_once, lambda: turns.append(1))
    assert sorted(reply.text for replies in held.conversations for reply in replies) == sorted(
        question for chat in chats(count) for question in chat.questions
    )
    assert all([reply.text.split(".")[1] for reply in replies] == ["0", "1", "2"] for replies in held.conversations)
    assert (held.turns, held.tokens, len(turns)) == (3 * count, 6 * count, 3 * count)
    assert system.most_open <= at_once and system.closed == count
    # A thread that comes late may find that another has held two chats, and nothing left for it.
    assert 0 < system.open_when_measured <= min(at_once, count), "memory is read while the last chats are open"


def test_a_failure_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="out of order"):
        hold(CountingSystem(fail_at=4), chats(4), 2, lambda: None)


def test_the_row_is_what_was_seen() -> None:
    held = hold(CountingSystem(), chats(4), 2, lambda: None)
    row = Figures([held], picture_ahead_ms=[5.0]).row("counting", 2)
    assert row["turns_per_second"] == pytest.approx(12 / held.seconds)
    assert row["tokens_per_second"] == pytest.approx(24 / held.seconds)
    assert row["first_token_ms_p50_first_turn"] == pytest.approx(1.0)
    assert row["first_token_ms_p50_later_turns"] == pytest.approx(2.0)
    assert row["first_token_ms_p95_later_turns"] == pytest.approx(3.0)
    assert row["first_token_ms_p50_picture_ahead"] == 5.0
    assert (row["kv_bytes_per_conversation"], row["visual_kv_bytes_per_conversation"]) == (300, 70)
    assert row["resident_bytes"] == 1000


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 95) == 3.0
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 95), percentile(values, 100)) == (50.0, 95.0, 100.0)


def test_chats_are_seeded_and_share_no_picture() -> None:
    first, again, other = draw_chats(3, turns=2, seed=1), draw_chats(3, turns=2, seed=1), draw_chats(3, turns=2, seed=2)
    assert [(chat.picture, chat.questions) for chat in first] == [(chat.picture, chat.questions) for chat in again]
    assert len({chat.picture for chat in [*first, *other]}) == 6
    assert all(len(chat.questions) == 2 for chat in first)
