import numpy as np
import pytest
from transformers import AutoTokenizer

from demo_model.anyres import layout
from demo_model.conversation import NEWLINE, NOT_ASKED, PICTURE, Conversation
from demo_model.questions import Question
from demo_model.tokenizer import IMAGE
from vflowopt.demo import model_path

TOKENIZER = AutoTokenizer.from_pretrained(model_path())
QUESTIONS = [
    Question("What colour is the star?", "red", "colour", False),
    Question("What is written on the star?", "k5", "code", True),
]


@pytest.mark.parametrize("order", ["picture first", "question first", "own turn"])
def test_a_row_is_the_chat_template_with_the_picture_expanded(order: str) -> None:
    text, image = {"type": "text", "text": QUESTIONS[0].text}, {"type": "image"}
    first = {"picture first": [image, text], "question first": [text, image], "own turn": [text]}[order]
    messages: list[dict[str, object]] = [{"role": "user", "content": [image]}] if order == "own turn" else []
    messages += [
        {"role": "user", "content": first},
        {"role": "assistant", "content": QUESTIONS[0].answer},
        {"role": "user", "content": QUESTIONS[1].text},
        {"role": "assistant", "content": QUESTIONS[1].answer},
    ]
    row = Conversation(TOKENIZER).row((448, 448), QUESTIONS, order=order)
    template = TOKENIZER.encode(TOKENIZER.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    picture = np.isin(row.ids, (PICTURE, NEWLINE))
    start = int(picture.argmax())
    collapsed = [*row.ids[:start], TOKENIZER.convert_tokens_to_ids(IMAGE), *row.ids[start + picture.sum() :]]
    assert collapsed == template
    assert picture.sum() == layout(448, 448).token_count


def test_only_answers_are_learned() -> None:
    row = Conversation(TOKENIZER).row((224, 224), QUESTIONS)
    learned = row.targets[row.targets != NOT_ASKED]
    assert TOKENIZER.decode(learned) == "red<|end|> k5<|end|>"
    asked = np.flatnonzero(row.targets != NOT_ASKED)
    assert (row.ids[asked + 1] == learned).all()


def test_hints_begin_at_the_word_that_the_question_is_about() -> None:
    row = Conversation(TOKENIZER).row((224, 224), QUESTIONS)
    hinted = np.flatnonzero(row.hints != NOT_ASKED)
    assert TOKENIZER.convert_ids_to_tokens(row.ids[hinted]) == ["▁star", "?", "<|end|>"] * 2
    assert TOKENIZER.convert_ids_to_tokens(row.hints[hinted]) == ["▁red"] * 3 + ["5"] + ["▁k"] * 2
    assert not ((row.hints != NOT_ASKED) & (row.targets != NOT_ASKED)).any()


def test_a_lone_digit_is_hinted_by_the_digit() -> None:
    row = Conversation(TOKENIZER).row((224, 224), [Question("Count the stars.", "3", "count", False)])
    assert set(TOKENIZER.convert_ids_to_tokens(row.hints[row.hints != NOT_ASKED])) == {"3"}


def test_dropped_tokens_leave_gaps_and_newlines_stay() -> None:
    conversation = Conversation(TOKENIZER)
    full = conversation.row((448, 336), QUESTIONS)
    keep = np.sort(np.random.default_rng(0).permutation(len(full.features))[:100])
    thin = conversation.row((448, 336), QUESTIONS, keep=keep)
    assert (thin.ids == PICTURE).sum() == len(thin.features) == 100
    assert (thin.ids == NEWLINE).sum() == (full.ids == NEWLINE).sum() == 24
    assert (full.ids[thin.positions] == thin.ids).all()
    visual = full.positions[full.ids == PICTURE]
    assert (thin.features == keep).all()
    assert (visual[thin.features] == thin.positions[thin.ids == PICTURE]).all()
