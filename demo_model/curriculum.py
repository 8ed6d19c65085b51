"""The language model's training data: a part of each picture's tokens, and questions that these tokens answer.

The parts are random, and do not depend on what they show. Only of close looks are several drawn, and one that shows a
code is used. It uses no weights.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demo_model.anyres import SIDE, layout
from demo_model.conversation import Conversation, Row
from demo_model.features import CachedPicture, FeatureCache
from demo_model.questions import ask
from demo_model.visible import answerable

WEIGHTS = {
    "colour": 0.5,
    "shape": 0.5,
    "code": 4.0,
    "place": 2.5,
    "existence": 1.0,
    "background": 0.15,
}
"""How often each kind is asked in training: the hard ones more often."""

_CLOSE_WEIGHTS = {"code": 1.0}
"""Close looks ask only for codes: among other questions the model did not learn to read a letter in half an hour; alone
it does in a minute."""

OVERVIEW = SIDE * SIDE
"""Tokens of the overview; they come first."""

_TURNS = 14
_CLOSE_TURNS = 5
_CLOSE_LOOKS = 8
"""Windows drawn for a close look, until one shows a code."""
_TOKENS_PER_STEP = 3000
_WHOLE_STRETCH = 0.15
"""Share of the time, at the end, in which half of the batches carry whole pictures."""
_CLOSE_STRETCH = 0.35
"""Share of the time, at the start, in which most looks are close."""
_ONE_ORDER = 0.4
"""Share of the time, at the start, in which every picture comes before its questions."""


def scattered(rng: np.random.Generator, picture: CachedPicture, overview: int, mosaic: int) -> np.ndarray:
    """So many random tokens of a picture's overview and of its mosaic, ascending."""
    first = rng.permutation(OVERVIEW)[:overview]
    second = OVERVIEW + rng.permutation(picture.count - OVERVIEW)[:mosaic]
    return np.sort(np.concatenate((first, second)))


def window(rng: np.random.Generator, picture: CachedPicture, overview: int, mosaic: int) -> np.ndarray:
    """So many random tokens of a picture's overview and a random rectangle of about so many of its mosaic, ascending.

    Fine detail lies in neighbouring tokens, which a scattered part seldom holds together.
    """
    plan = layout(*picture.scene.size)
    rows, columns = (stop - start for start, stop in (plan.token_rows, plan.token_columns))
    height = min(rows, max(1, round(math.sqrt(mosaic) * math.exp(rng.uniform(-0.4, 0.4)))))
    width = min(columns, max(1, round(mosaic / height)))
    top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
    inside = (top + np.arange(height))[:, None] * columns + left + np.arange(width)
    first = np.sort(rng.permutation(OVERVIEW)[:overview])
    return np.concatenate((first, OVERVIEW + inside.reshape(-1)))


@dataclass(frozen=True)
class _Part:
    """How much of every picture of a batch is shown; ``mosaic`` above any picture's means all of it.

    A ``close`` look is so small that there is often but one thing to see: what to copy is learned before where to find
    it.
    """

    overview: int
    mosaic: int
    together: bool
    close: bool = False


def _part(rng: np.random.Generator, done: float) -> _Part:
    if done > 1 - _WHOLE_STRETCH and rng.random() < 0.5:
        return _Part(OVERVIEW, 4 * OVERVIEW, together=False)
    if rng.random() < (0.65 if done < _CLOSE_STRETCH else 0.1):
        return _Part(int(rng.integers(8, 33)), int(rng.integers(20, 161)), together=True, close=True)
    overview = OVERVIEW if rng.random() < 0.5 else int(rng.integers(64, OVERVIEW + 1))
    kind = rng.choice(["window", "sparse", "dense"], p=[0.55, 0.2, 0.25])
    least, most = {"window": (70, 260), "sparse": (12, 160), "dense": (200, 900)}[str(kind)]
    mosaic = round(math.exp(rng.uniform(math.log(least), math.log(most))))
    return _Part(overview, mosaic, together=kind == "window")


@dataclass(frozen=True)
class Batch:
    """Conversations about a picture each.

    Attributes:
        rows: the conversations.
        features: of each the features (tokens, width) that it shows.
        labels: of each what these tokens show, (tokens, heads).
    """

    rows: list[Row]
    features: list[Tensor]
    labels: list[Tensor]

    def shard(self, number: int, shards: int) -> "Batch":
        """Every so many-th conversation."""
        return Batch(self.rows[number::shards], self.features[number::shards], self.labels[number::shards])


def draw(cache: FeatureCache, conversation: Conversation, rng: np.random.Generator, done: float) -> Batch:
    """A batch; ``done`` is the share of the training that is over."""
    part = _part(rng, done)
    choose = window if part.together else scattered
    batch = Batch([], [], [])
    for number in rng.integers(0, len(cache), max(4, round(_TOKENS_PER_STEP / (part.overview + part.mosaic + 150)))):
        picture = cache.pictures[int(number)]
        order = "picture first"
        if done > _ONE_ORDER:
            order = str(rng.choice(["picture first", "question first", "own turn"], p=[0.8, 0.1, 0.1]))
        labels = np.array(cache.labels(picture))
        turns, weights = (_CLOSE_TURNS, _CLOSE_WEIGHTS) if part.close else (_TURNS, WEIGHTS)
        asked = ask(picture.scene, rng, 2 * turns, weights)
        for _ in range(_CLOSE_LOOKS if part.close else 1):
            keep = choose(rng, picture, part.overview, part.mosaic)
            seen = labels[keep]
            questions = [question for question in asked if answerable(question, seen, part.overview)][:turns]
            if any(question.kind == "code" for question in questions):
                break
        if questions:
            row = conversation.row(picture.scene.size, questions, keep=keep, order=order)
            batch.rows.append(row)
            batch.features.append(cache.features(picture, row.features))
            batch.labels.append(torch.from_numpy(seen.astype(np.int64)))
    # Few pictures, and none of them with a code: look at others.
    return batch if len(batch.rows) > 1 else draw(cache, conversation, rng, done)
