import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from demo_model.questions import PHRASINGS
from demo_model.scene import COLOURS, DIGITS, LETTERS, SHAPES
from demo_model.tokenizer import ASSISTANT, END, IMAGE, PAD, USER, build_tokenizer
from vflowopt.demo import model_path

TOKENIZER: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(model_path())


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_the_committed_tokenizer_is_the_one_the_code_builds() -> None:
    assert build_tokenizer().backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1).filter(lambda text: "<" not in text and "\u2581" not in text and not text[0].isspace()))
def test_any_text_comes_back_in_lower_case(text: str) -> None:
    # The tokenizer's own lower-casing: Python's differs for a few letters.
    lower = TOKENIZER.backend_tokenizer.normalizer.normalize_str(text)
    assert TOKENIZER.decode(encode(text)) == lower


@pytest.mark.parametrize("code", [letter + digit for letter in LETTERS for digit in DIGITS])
def test_a_code_is_two_tokens(code: str) -> None:
    assert len(encode(code)) == 2
    assert encode(code) == encode(code.lower())


@pytest.mark.parametrize("word", [*SHAPES, *COLOURS, "yes", "no", "center", "photo", "please"])
def test_a_common_word_is_one_token(word: str) -> None:
    assert len(encode(word)) == 1


def test_questions_are_short() -> None:
    for phrasings in PHRASINGS.values():
        for phrasing in phrasings:
            text = phrasing.format(shape="star", shapes="stars", colour="red", article="a")
            assert len(encode(text)) == len(text.strip("?.").split()) + 1


def test_special_tokens_are_single_and_the_end_stops() -> None:
    for token in (USER, ASSISTANT, END, IMAGE, PAD):
        assert TOKENIZER.encode(token, add_special_tokens=False) == [TOKENIZER.convert_tokens_to_ids(token)]
    assert TOKENIZER.eos_token == END and TOKENIZER.pad_token == PAD


def test_the_chat_template_adds_nothing_of_its_own() -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "star"},
        {"role": "user", "content": "Where?"},
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|><image>What is it?<|end|><|assistant|>star<|end|><|user|>Where?<|end|><|assistant|>"


def test_the_chat_template_keeps_the_order_of_parts() -> None:
    parts = [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "text", "text": "what is it?"}]
    text = TOKENIZER.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert text == "<|user|>Look:<image>what is it?<|end|>"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "system", "content": "x"}, "not 'system'"),
        ({"role": "user", "content": [{"type": "audio"}]}, "not 'audio'"),
    ],
)
def test_the_chat_template_says_what_it_cannot_take(message: dict[str, object], error: str) -> None:
    with pytest.raises(Exception, match=error):
        TOKENIZER.apply_chat_template([message], tokenize=False)
