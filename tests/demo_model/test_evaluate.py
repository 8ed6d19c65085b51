import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from demo_model.anyres import tiles
from demo_model.architecture import normalise
from demo_model.evaluate import answered_right, evaluate, load, picture_tokens
from demo_model.questions import Question, ask, held_out
from demo_model.scene import generate
from demo_model.tokenizer import ASSISTANT, END, IMAGE, USER
from vflowopt.demo import model_path, picture_path

Loaded = tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(model_path())


@torch.no_grad()
def generated(loaded: Loaded, picture: np.ndarray, question: str) -> str:
    """The library's own greedy answer."""
    model, tokenizer = loaded
    visual = len(picture_tokens(model, picture))
    text = USER + IMAGE * visual + question + END + ASSISTANT
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    answer = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=normalise(torch.from_numpy(tiles(picture)))[None],
        image_sizes=torch.tensor([picture.shape[:2]]),
        do_sample=False,
        max_new_tokens=8,
    )[0, ids.shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


@torch.no_grad()
def test_one_pass_judges_as_generate_does(loaded: Loaded) -> None:
    model, tokenizer = loaded
    scene = generate(1, held_out=True, size=(224, 224))
    asked = ask(scene, np.random.default_rng(0), 4)
    answers = [generated(loaded, scene.image, question.text) for question in asked]
    visual = picture_tokens(model, scene.image)
    judged = answered_right(model, tokenizer, visual, asked)
    assert judged == [answer == question.answer for answer, question in zip(answers, asked, strict=True)]
    # Its own answers are right by definition, and with a token more they are wrong.
    own = [Question(q.text, a, q.kind, q.fine) for q, a in zip(asked, answers, strict=True) if a]
    assert all(answered_right(model, tokenizer, visual, own))
    assert not any(
        answered_right(model, tokenizer, visual, [Question(q.text, q.answer + " now", q.kind, q.fine) for q in own])
    )


def test_it_answers_held_out_questions_from_the_picture(loaded: Loaded) -> None:
    scores = evaluate(*loaded, questions=40)["all"]
    assert scores.questions >= 40
    assert scores.right >= 80  # the model card says what is measured on 2,000
    assert scores.blank <= 40


def test_held_out_counts() -> None:
    assert len(list(held_out(0, 3))) == 3


def test_the_bundled_pictures_have_questions() -> None:
    import json

    from PIL import Image

    about = json.loads((picture_path() / "questions.json").read_text(encoding="utf-8"))
    assert len(about) == 3
    for name, questions in about.items():
        with Image.open(picture_path() / name) as picture:
            assert picture.format == "PNG"
        assert len(questions) == 5 and all(item["question"] and item["answer"] for item in questions)
