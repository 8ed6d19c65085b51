import numpy as np
import pytest

from demo_model.anyres import SIDE, token_sources
from demo_model.labels import HEADS, label
from demo_model.questions import Question, ask
from demo_model.scene import SHAPES, Scene, generate
from demo_model.visible import answerable

SHAPE = list(HEADS).index("shape")


@pytest.fixture(scope="module")
def scene() -> Scene:
    return generate(4, size=(448, 448))


@pytest.fixture(scope="module")
def labels(scene: Scene) -> np.ndarray:
    sources = token_sources(*scene.size)
    return label(scene).labels.transpose(0, 2, 1).reshape(-1, len(HEADS))[sources[sources >= 0]]


def test_a_whole_picture_answers_nearly_everything(scene: Scene, labels: np.ndarray) -> None:
    asked = ask(scene, np.random.default_rng(0), 20)
    answered = [answerable(question, labels, SIDE * SIDE) for question in asked]
    assert np.mean(answered) > 0.9


def test_without_the_objects_patches_its_colour_is_not_asked(scene: Scene, labels: np.ndarray) -> None:
    question = next(item for item in ask(scene, np.random.default_rng(0), 40) if item.kind == "colour")
    shape = next(index for index, name in enumerate(SHAPES, 1) if name in question.text)
    assert answerable(question, labels[labels[:, SHAPE] == shape][:1], 0)
    assert not answerable(question, labels[labels[:, SHAPE] != shape], 0)


def test_counting_needs_most_of_the_overview(labels: np.ndarray) -> None:
    question = Question("How many stars are there?", "2", "count", False)
    assert answerable(question, labels, SIDE * SIDE)
    assert not answerable(question, labels[SIDE * SIDE // 2 :], SIDE * SIDE // 2)
