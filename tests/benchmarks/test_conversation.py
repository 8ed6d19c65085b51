"""The conversation benchmark at its smallest: real systems, and whether the figures are what they claim to be."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import conversation
from benchmarks.chat import Chat, draw_chats
from benchmarks.openai_system import kv_bytes_per_token
from benchmarks.system import Reply, System
from benchmarks.transformers_system import TransformersSystem
from benchmarks.vflow_system import VFlowSystem
from vflowopt.demo import model_path

KEYS = {
    "system",
    "conversations",
    "turns_per_second",
    "tokens_per_second",
    "first_token_ms_p50_first_turn",
    "first_token_ms_p95_first_turn",
    "first_token_ms_p50_later_turns",
    "first_token_ms_p95_later_turns",
    "kv_bytes_per_conversation",
    "resident_bytes",
}
VISUAL_TOKENS = 1312
NEW_TOKENS = 4


def held(make: Callable[[], System], chat: Chat) -> list[Reply]:
    with closing(make()) as system:
        opened = system.open(chat)
        replies = [opened.say(question) for question in chat.questions]
        opened.close()
    return replies


def test_all_systems_on_the_same_weights_say_the_same() -> None:
    (chat,) = draw_chats(1, turns=2, seed=5)
    ours = held(lambda: VFlowSystem("ours", "full", new_tokens=NEW_TOKENS, threads=1), chat)
    per_token = kv_bytes_per_token(model_path(), 4)
    for keep_cache in (True, False):

        def make(keep_cache: bool = keep_cache) -> System:
            return TransformersSystem("theirs", model_path(), keep_cache=keep_cache, new_tokens=NEW_TOKENS, threads=1)

        theirs = held(make, chat)
        assert [reply.text for reply in theirs] == [reply.text for reply in ours]
        assert [reply.tokens for reply in theirs] == [NEW_TOKENS] * 2 == [reply.tokens for reply in ours]
        tokens = [reply.kv_bytes / per_token for reply in theirs]
        assert all(count.is_integer() for count in tokens)
        # The second turn's question and answer, on top of the first turn with the picture; ours is in whole pages.
        assert VISUAL_TOKENS < tokens[0] < tokens[1] - NEW_TOKENS < VISUAL_TOKENS + 64
        assert tokens[1] <= ours[1].kv_bytes / per_token <= tokens[1] + 16
    assert [reply.visual_kv_bytes for reply in ours] == [VISUAL_TOKENS * per_token] * 2


def test_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--systems", "vflow@10%,transformers-cached", "--conversations", "1,2", "--repeats", "1"]
    arguments += ["--talks", "1", "--turns", "2", "--new-tokens", "2", "--threads", "1"]
    assert conversation.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    systems = ["vflow@10%", "transformers-cached"]
    assert [(row["system"], row["conversations"]) for row in rows] == [(name, n) for n in (1, 2) for name in systems]
    for row in rows:
        assert set(row) >= KEYS
        assert all(row[key] > 0 for key in KEYS - {"system"})
        assert row["tokens_per_second"] == pytest.approx(2 * row["turns_per_second"])
    pruned, cached = rows[:2]
    assert pruned["first_token_ms_p50_picture_ahead"] > 0
    per_token = kv_bytes_per_token(model_path(), 4)
    assert 0.08 < pruned["visual_kv_bytes_per_conversation"] / (VISUAL_TOKENS * per_token) <= 0.11
    assert cached["kv_bytes_per_conversation"] > VISUAL_TOKENS * per_token
    printed = capsys.readouterr().out
    assert "turns/s at 16" not in printed and "first token, picture added ahead" in printed


def test_ratios_of_the_rows() -> None:
    rows = [
        {"system": "vflow@10%", "conversations": 16, "turns_per_second": 30.0},
        {"system": "vllm", "conversations": 16, "turns_per_second": 10.0},
    ]
    (line,) = conversation.compared(rows)
    assert line.startswith("turns/s at 16, 10% / vllm") and "3.000" in line and ">= 2" in line


@pytest.mark.parametrize("arguments", [["--systems", "vllm"], ["--systems", "sglang"], ["--conversations", "0"]])
def test_what_cannot_be_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        conversation.main(arguments)
    assert arguments[-1] in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert conversation.main(["--systems", "vllm", "--vllm", "http://127.0.0.1:9"]) == 1
    assert "no OpenAI-compatible server answers at http://127.0.0.1:9" in capsys.readouterr().err
