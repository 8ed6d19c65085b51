"""Questions about scenes and their true answers. Seeded; it uses neither tokens nor models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from demo_model.labels import PLACES, place_of
from demo_model.scene import COLOURS, SHAPES, Scene, SceneObject, generate

KINDS = ("colour", "shape", "code", "place", "existence", "background")
"""Kinds of question that the embedded model is made for."""

DRAWN = (*KINDS, "count")
"""Kinds that can be drawn: counting can be asked about, but the model was not brought to do it; see the model card."""

PHRASINGS = {
    "colour": (
        "What colour is the {shape}?",
        "What color is the {shape}?",
        "Which colour does the {shape} have?",
        "Tell me the colour of the {shape}.",
    ),
    "shape": ("What shape is the {colour} object?", "Which shape is {colour}?", "What is the {colour} thing?"),
    "code": (
        "What is written on the {shape}?",
        "Read the sign on the {shape}.",
        "Which code is on the {shape}?",
        "What does the {shape} say?",
    ),
    "place": (
        "Where is the {shape}?",
        "In which part of the picture is the {shape}?",
        "Where do you see the {shape}?",
    ),
    "existence": (
        "Is there {article} {colour} {shape}?",
        "Do you see {article} {colour} {shape}?",
        "Does the picture show {article} {colour} {shape}?",
    ),
    "count": ("How many {shapes} are there?", "How many {shapes} do you see?", "Count the {shapes}."),
    "background": (
        "What colour is the background?",
        "What color is the background?",
        "Which colour does the background have?",
    ),
}

_MARGIN = 0.04
"""Share of the picture that an object asked about by place must keep from the lines between the thirds."""


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        text: the question as a person would type it.
        answer: the true answer, lower case.
        kind: one of ``DRAWN``.
        fine: it asks for fine detail: a code, or a trait of a small object.
    """

    text: str
    answer: str
    kind: str
    fine: bool


def plural(shape: str) -> str:
    """The shape's name for more than one of them."""
    return shape + ("es" if shape.endswith("s") else "s")


def _article(colour: str) -> str:
    return "an" if colour[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, items: list[SceneObject]) -> SceneObject | None:
    return items[int(rng.integers(len(items)))] if items else None


def _phrase(rng: np.random.Generator, kind: str, **words: str) -> str:
    phrasings = PHRASINGS[kind]
    return phrasings[int(rng.integers(len(phrasings)))].format(**words)


def _only_of_shape(scene: Scene) -> list[SceneObject]:
    shapes = [item.shape for item in scene.objects]
    return [item for item in scene.objects if shapes.count(item.shape) == 1]


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _pick(rng, _only_of_shape(scene))
    if item is None:
        return None
    return Question(_phrase(rng, "colour", shape=item.shape), item.colour, "colour", item.small)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    colours = [item.colour for item in scene.objects]
    item = _pick(rng, [item for item in scene.objects if colours.count(item.colour) == 1])
    if item is None:
        return None
    return Question(_phrase(rng, "shape", colour=item.colour), item.shape, "shape", item.small)


def _code(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _pick(rng, [item for item in _only_of_shape(scene) if item.code])
    if item is None or item.code is None:
        return None
    return Question(_phrase(rng, "code", shape=item.shape), item.code.lower(), "code", True)


def _clear_of_thirds(item: SceneObject, width: int, height: int) -> bool:
    x, y = item.centre
    return all(abs(value - line) >= _MARGIN for value in (x / width, y / height) for line in (1 / 3, 2 / 3))


def _place(scene: Scene, rng: np.random.Generator) -> Question | None:
    width, height = scene.size
    clear = [item for item in _only_of_shape(scene) if not item.small and _clear_of_thirds(item, width, height)]
    item = _pick(rng, clear)
    if item is None:
        return None
    place = PLACES[place_of(item.centre, width, height)]
    return Question(_phrase(rng, "place", shape=item.shape), place, "place", False)


def _existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    pairs = {(item.colour, item.shape) for item in scene.objects}
    small = {(item.colour, item.shape): item.small for item in scene.objects}
    if rng.random() < 0.5:
        colour, shape = sorted(pairs)[int(rng.integers(len(pairs)))]
    else:
        # Mostly a colour and a shape that the picture does hold, though not together.
        near = rng.random() < 0.75
        colours = sorted({item.colour for item in scene.objects}) if near else list(COLOURS)
        shapes = sorted({item.shape for item in scene.objects}) if near else list(SHAPES)
        absent = [(colour, shape) for colour in colours for shape in shapes if (colour, shape) not in pairs]
        if not absent:
            return None
        colour, shape = absent[int(rng.integers(len(absent)))]
    text = _phrase(rng, "existence", article=_article(colour), colour=colour, shape=shape)
    return Question(text, "yes" if (colour, shape) in pairs else "no", "existence", small.get((colour, shape), False))


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    groups: dict[int, list[str]] = {}
    for shape in sorted({item.shape for item in scene.objects}):
        number = sum(item.shape == shape for item in scene.objects)
        groups.setdefault(number, []).append(shape)
    # Three and four share one place in a scene, so they are asked twice as often: each number is then as frequent.
    numbers = sorted(number for number in groups if number <= 4)
    weights = np.array([2.0 if number > 2 else 1.0 for number in numbers])
    number = int(rng.choice(numbers, p=weights / weights.sum()))
    shape = groups[number][int(rng.integers(len(groups[number])))]
    small = any(item.small for item in scene.objects if item.shape == shape)
    return Question(_phrase(rng, "count", shapes=plural(shape)), str(number), "count", small)


def _background(scene: Scene, rng: np.random.Generator) -> Question | None:
    return Question(_phrase(rng, "background"), scene.tint, "background", False)


_NAMES = frozenset((*SHAPES, *(plural(shape) for shape in SHAPES), *COLOURS))

_ASK: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "colour": _colour,
    "shape": _shape,
    "code": _code,
    "place": _place,
    "existence": _existence,
    "count": _count,
    "background": _background,
}


def ask(scene: Scene, rng: np.random.Generator, count: int, weights: dict[str, float] | None = None) -> list[Question]:
    """Draw distinct questions about a scene.

    Args:
        scene: what to ask about.
        rng: where the choice comes from.
        count: how many questions; fewer come back where the scene does not carry so many.
        weights: relative frequency per kind of ``DRAWN``; by default all of ``KINDS`` alike.
    """
    weights = dict.fromkeys(KINDS, 1.0) if weights is None else weights
    share = np.array([weights.get(kind, 0.0) for kind in DRAWN])
    questions: list[Question] = []
    asked: set[tuple[str, ...]] = set()
    for _ in range(6 * count):
        kind = DRAWN[int(rng.choice(len(DRAWN), p=share / share.sum()))]
        question = _ASK[kind](scene, rng)
        if question is None:
            continue
        subject = (kind, *(word for word in question.text.strip("?.").split() if word in _NAMES))
        if subject in asked:
            continue
        asked.add(subject)
        questions.append(question)
        if len(questions) == count:
            break
    return questions


def held_out(seed: int, count: int, questions: int = 8) -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes for evaluation, on photographs that training never sees, with questions of every kind.

    Args:
        seed: first seed of the scenes; the streams of different seeds overlap only if they are closer than ``count``.
        count: number of scenes.
        questions: questions per scene.
    """
    for number in range(seed, seed + count):
        scene = generate(number, held_out=True)
        yield scene, ask(scene, np.random.default_rng([number, 1]), questions)
