"""Text that comes token by token: whole characters, and never a piece of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vflowopt.runtime.chat import ChatFormat
from vflowopt.runtime.detokenize import TextStream
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture(scope="module")
def chat(shared_runtime: Runtime) -> ChatFormat:
    return shared_runtime.chat  # one token a byte: characters come in pieces


@given(text=st.text(max_size=30), stop=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_deltas_join_to_the_text_before_the_first_stop(chat: ChatFormat, text: str, stop: list[str]) -> None:
    stream = TextStream(chat, stop)
    deltas = []
    for token in chat.text(text):
        deltas.append(stream.push(token))
        if stream.stopped:
            break
    deltas.append(stream.finish())
    met = [place for place in (text.find(each) for each in stop) if place >= 0]
    assert stream.stopped == bool(met)
    assert "".join(deltas) == stream.text
    if "\ufffd" not in text:
        # A stop string met early ends the text where it begins; one that begins earlier but ends later loses to it.
        ends = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
        first_end = min((end for end, _ in ends), default=None)
        assert stream.text == (
            text if first_end is None else text[: min(start for end, start in ends if end == first_end)]
        )


def test_a_character_is_held_back_until_it_is_whole(chat: ChatFormat) -> None:
    stream = TextStream(chat)
    assert [stream.push(token) for token in chat.text("é!")] == ["", "é", "!"]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [("ab", "x", 2), ("abEND", "END", 2), ("END", "END", 0), ("éé", "é", 0), ("aé!", "!", 3), ("aé!é", "é", 1)],
)
def test_the_tokens_shown_are_those_before_the_stop_string(chat: ChatFormat, text: str, stop: str, shown: int) -> None:
    stream = TextStream(chat, [stop])
    for token in chat.text(text):
        stream.push(token)
        if stream.stopped:
            break
    stream.finish()
    assert stream.tokens_shown == shown


def test_the_beginning_of_a_stop_string_is_held_back_and_freed(chat: ChatFormat) -> None:
    stream = TextStream(chat, ["END"])
    assert [stream.push(token) for token in chat.text("aENb")] == ["a", "", "", "ENb"]
    assert not stream.stopped
