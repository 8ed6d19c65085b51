"""The exact length of answers, with a model that ends them as soon as it may."""

import pytest

from vflow_client import Client
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture
def laconic(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token but one ends an answer, so that the model ends it as soon as it may."""
    (kept,) = runtime.chat.text("a")
    monkeypatch.setattr(runtime.chat, "stop_ids", frozenset(range(runtime.model.head.out_features)) - {kept})


@pytest.mark.parametrize(
    ("fewest", "most", "tokens", "reason"),
    [
        (0, 8, 1, "STOP"),
        (1, 8, 2, "STOP"),  # the token that ends the answer counts, too
        (2, 8, 3, "STOP"),
        (7, 8, 8, "STOP"),
        (8, 8, 8, "LENGTH"),
        (1, 1, 1, "LENGTH"),
        (0, 1, 1, "STOP"),
    ],
)
def test_an_answer_has_as_many_tokens_as_were_asked_for(
    client: Client, laconic: None, fewest: int, most: int, tokens: int, reason: str
) -> None:
    with client.session() as session:
        answer = session.ask("Hello", min_new_tokens=fewest, max_new_tokens=most)
        text = answer.read()
    assert (answer.usage.completion_tokens, answer.finish_reason) == (tokens, reason)
    assert text == "a" * (tokens - (reason == "STOP"))
