from collections import Counter

import numpy as np

from demo_model.labels import PLACES, place_of
from demo_model.questions import DRAWN, KINDS, ask, held_out, plural
from demo_model.scene import COLOURS, HELD_OUT_PHOTOGRAPHS, SHAPES, generate


def test_answers_are_true() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(40):
        scene = generate(seed)
        for question in ask(scene, np.random.default_rng(seed), 8, dict.fromkeys(DRAWN, 1.0)):
            words = question.text.lower().strip("?.").split()
            shape = next((name for name in SHAPES if name in words or plural(name) in words), None)
            colour = next((name for name in COLOURS if name in words), None)
            of_shape = [item for item in scene.objects if item.shape == shape]
            kinds[question.kind] += 1
            match question.kind:
                case "colour":
                    assert [item.colour for item in of_shape] == [question.answer]
                case "shape":
                    assert [item.shape for item in scene.objects if item.colour == colour] == [question.answer]
                case "code":
                    assert question.fine
                    assert [(item.code or "").lower() for item in of_shape] == [question.answer]
                case "place":
                    assert [PLACES[place_of(item.centre, *scene.size)] for item in of_shape] == [question.answer]
                case "existence":
                    assert (question.answer == "yes") == any(item.colour == colour for item in of_shape)
                case "count":
                    assert len(of_shape) == int(question.answer)
                case "background":
                    assert scene.tint == question.answer
    assert set(kinds) == set(DRAWN)


def test_only_what_the_model_is_made_for_is_asked_unless_more_is_wanted() -> None:
    kinds = {question.kind for _, questions in held_out(7, 30) for question in questions}
    assert kinds == set(KINDS)


def test_yes_and_no_and_every_number_come_alike_often() -> None:
    answers: Counter[str] = Counter()
    for seed in range(70):
        for question in ask(generate(seed, size=(448, 448)), np.random.default_rng(seed), 8, dict.fromkeys(DRAWN, 1.0)):
            if question.kind in ("existence", "count"):
                answers[question.answer] += 1
    assert 0.6 < answers["yes"] / answers["no"] < 1.6
    numbers = [answers[str(number)] for number in range(1, 5)]
    assert max(numbers) < 2 * min(numbers)


def test_no_question_is_asked_twice() -> None:
    for seed in range(10):
        texts = [question.text for question in ask(generate(seed), np.random.default_rng(seed), 8)]
        assert len(texts) == len(set(texts)) >= 6


def test_held_out_is_repeatable_and_on_other_photographs() -> None:
    first, again = list(held_out(100, 3)), list(held_out(100, 3))
    assert [questions for _, questions in first] == [questions for _, questions in again]
    assert all(scene.photograph in HELD_OUT_PHOTOGRAPHS for scene, _ in first)
