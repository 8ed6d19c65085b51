"""Which questions some tokens of a picture can answer, so that training on a part of a picture asks only those.

The choice of tokens stays random; what is chosen by the labels is what to ask about them.
"""

import numpy as np

from demo_model.anyres import SIDE
from demo_model.labels import HEADS
from demo_model.questions import Question, plural
from demo_model.scene import COLOURS, DIGITS, LETTERS, SHAPES

_SHAPE, _COLOUR, _LETTER, _DIGIT = (list(HEADS).index(name) for name in ("shape", "colour", "letter", "digit"))
_ENOUGH_TO_COUNT = 0.85
"""Share of the overview that must be there to be asked how many."""


def answerable(question: Question, seen: np.ndarray, overview: int) -> bool:
    """Whether some tokens show what a question is about.

    Args:
        question: what is asked.
        seen: labels (tokens, heads) of these tokens, the overview's first.
        overview: how many of them are the overview's.
    """
    words = question.text.lower().strip("?.").split()
    shape = next((1 + i for i, name in enumerate(SHAPES) if name in words or plural(name) in words), 0)
    colour = next((1 + i for i, name in enumerate(COLOURS) if name in words), 0)
    if question.kind == "colour":
        return bool((seen[:, _SHAPE] == shape).any())
    if question.kind == "shape":
        return bool((seen[:, _COLOUR] == colour).any())
    if question.kind == "code":
        letter, digit = question.answer[0], question.answer[1]
        return bool(
            (seen[:, _LETTER] == 1 + LETTERS.lower().index(letter)).any()
            and (seen[:, _DIGIT] == 1 + DIGITS.index(digit)).any()
        )
    if question.kind == "place":
        return bool((seen[:overview, _SHAPE] == shape).any())
    if question.kind == "count":
        return overview >= _ENOUGH_TO_COUNT * SIDE * SIDE
    if question.kind == "existence" and question.answer == "yes":
        return bool(((seen[:, _SHAPE] == shape) & (seen[:, _COLOUR] == colour)).any())
    return True
