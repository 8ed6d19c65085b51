"""Many conversations in one engine: each answers as if it were alone, and shared pages are stored once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pkgutil import resolve_name

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.served import Served
from vflow_client import Client, Session
from vflowopt.runtime.model_runner import Runtime


def converse(session: Session, number: int) -> list[str]:
    """Three turns, of a length and of pictures that differ from conversation to conversation."""
    answers = []
    if number % 3:
        session.add_image(png(60 + 20 * number, 90, seed=number))
    for turn in range(3):
        pictures = [png(70, 50 + 10 * number, seed=number)] if turn == number % 3 else []
        sampled = {"temperature": 1.0, "seed": number} if number % 2 else {}
        text = f"Question {turn} " * (1 + number)
        answers.append(session.ask(text, images=pictures, max_new_tokens=4 + 3 * number, **sampled).read())
    return answers


def together(client: Client, count: int) -> list[list[str]]:
    def one(number: int) -> list[str]:
        with client.session("full" if number == 2 else None) as session:
            return converse(session, number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


@pytest.fixture(scope="module")
def alone(runtime: Runtime) -> list[list[str]]:
    """The answers of six conversations, each alone on the service."""
    served = Served(runtime)
    try:
        answers = []
        for number in range(6):
            with served.client.session("full" if number == 2 else None) as session:
                answers.append(converse(session, number))
        return answers
    finally:
        served.stop()


def test_a_batch_answers_like_its_members_alone(client: Client, alone: list[list[str]]) -> None:
    assert together(client, 6) == alone


def test_answers_stay_the_same_where_pages_run_short(
    serve: Serve, model_folder: Path, alone: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns are preempted and resumed, idle caches offloaded and restored, prompts cut in small pieces."""
    monkeypatch.setattr("vflow_server.engine.scheduler.PROMPT_TOKENS", 24)
    cramped = Runtime.load(model_folder, kv_budget=700 << 10)
    cramped.chat.stop_ids = frozenset()
    preempted = _counting(monkeypatch, "vflow_server.kv.manager.KVCacheManager.preempt")
    restored = _counting(monkeypatch, "vflow_server.kv.manager.restore")
    assert together(serve(runtime=cramped).client, 6) == alone
    assert preempted() + restored() > 0, "pages never ran short: the test proves nothing"


def test_the_same_picture_in_two_sessions_is_held_once(served: Served) -> None:
    picture = png(112, 112, seed=5)
    with served.client.session() as first, served.client.session() as second:
        first.add_image(picture)
        used = served.on_engine(lambda: served.service.runtime.pool.bytes_used)
        receipt = second.add_image(picture)
        assert receipt.cache_hit and receipt.encode_ms == 0
        assert served.on_engine(lambda: served.service.runtime.pool.bytes_used) == used
        assert first.state().kv_bytes == second.state().kv_bytes > 0
        one, other = (session.ask("What is it?", max_new_tokens=6).read() for session in (first, second))
        assert one == other
        assert first.ask("And?", max_new_tokens=6).read() == second.ask("And?", max_new_tokens=6).read()


def _counting(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], int]:
    """Count the calls of a function, without changing what it does."""
    original, calls = resolve_name(name), []

    def counted(*arguments: object) -> object:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(name, counted)
    return lambda: len(calls)
