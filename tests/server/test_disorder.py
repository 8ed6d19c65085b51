"""Many clients at once that cancel, run out of time and compete for too small a pool, at random.

The turns that a session finished have the answers that it would have given alone, and no KV page is lost.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.waiting import until
from vflow_client import CapacityExhausted, Client, DeadlineExceeded, Session
from vflowopt.runtime.model_runner import Runtime

STRATEGIES = ("full", "preset-50", "preset-10")
PICTURES = [png(60, 60, seed) for seed in range(3)] + [png(50, 150), png(120, 40)]


@pytest.fixture(scope="session")
def scarce(model_folder: Path) -> Runtime:
    """A model with pages for about three of the conversations below at a time."""
    runtime = Runtime.load(model_folder, kv_budget=700 << 10)
    runtime.chat.stop_ids = frozenset()
    return runtime


@dataclass
class Script:
    """The steps that one client finished in one session: added pictures, and turns with their answers."""

    strategy: str
    steps: list[tuple[str, bytes | None, str]] = field(default_factory=list)

    def repeat(self, client: Client) -> list[str]:
        with client.session(self.strategy) as session:
            return [perform(session, question, picture) for question, picture, _ in self.steps]


def perform(session: Session, question: str, picture: bytes | None) -> str:
    """Ask for a short answer and read it to the end, or show a picture where there is no question."""
    if not question:
        assert picture is not None
        return session.add_image(picture).digest
    return session.ask(question, images=[picture] if picture else [], max_new_tokens=6).read()


def interrupt(session: Session, question: str, picture: bytes | None, chance: random.Random) -> None:
    """Ask for a long answer, and go away or run out of time."""
    timeout = chance.choice([20, 20, 0.02])
    answer = session.ask(question, images=[picture] if picture else [], max_new_tokens=4000, timeout=timeout)
    with suppress(DeadlineExceeded):
        for _ in range(chance.randrange(4)):
            next(answer)
    answer.close()


def live(client: Client, seed: int) -> tuple[Session, Script]:
    """One client's life: mostly interrupted."""
    chance = random.Random(seed)
    script = Script(chance.choice(STRATEGIES))
    session = client.session(script.strategy)
    for step in range(6):
        question = chance.choice(["", f"Question {step}", "Why?"])
        picture = chance.choice(PICTURES) if not question or chance.random() < 0.3 else None
        try:
            if question and chance.random() < 0.5:
                interrupt(session, question, picture, chance)
            else:
                script.steps.append((question, picture, perform(session, question, picture)))
        except CapacityExhausted:
            pass  # refused as a whole: nothing changed
    return session, script


@pytest.mark.parametrize("seed", range(2))
def test_disorder_changes_no_answer_and_loses_no_page(
    serve: Serve, runtime: Runtime, scarce: Runtime, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("vflow_server.engine.scheduler.PROMPT_TOKENS", 16)
    served = serve(runtime=scarce, max_running="3")
    with ThreadPoolExecutor(5) as threads:
        lives = list(threads.map(lambda number: live(served.client, 100 * seed + number), range(5)))
    until(lambda: not any(session.busy for session in served.service.sessions))
    states = [session.state() for session, _ in lives]
    assert sum(state.kv_bytes for state in states) == served.kv_bytes()
    for state, (_, script) in zip(states, lives, strict=True):
        assert state.turn_count == sum(bool(question) for question, _, _ in script.steps)
    finished = [script for _, script in lives if script.steps]
    assert len(finished) > 2
    undisturbed = serve(runtime=runtime).client
    for script in finished:
        assert script.repeat(undisturbed) == [answer for _, _, answer in script.steps]
