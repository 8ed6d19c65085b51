"""The chats of a benchmark: each has a picture of its own, and a question for each turn."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from demo_model.questions import ask
from demo_model.scene import generate

SIDE = 448
"""Pixels of a picture's sides."""


@dataclass(frozen=True, eq=False)
class Chat:
    """A picture, and the questions of one conversation about it.

    Attributes:
        picture: the bytes of a PNG file; no two chats have the same.
        questions: one for each turn; the picture belongs to the first.
    """

    picture: bytes
    questions: tuple[str, ...]


def draw_chats(count: int, *, turns: int, seed: int) -> list[Chat]:
    """Draw ``count`` chats of ``turns`` turns. Equal seeds draw equal chats; different ones share no picture."""
    chats = []
    for number in tqdm(range(count), desc="drawing pictures", unit="picture", leave=False, disable=None):
        rng = np.random.default_rng([seed, number])
        scene = generate(int(rng.integers(1 << 31)), held_out=True, size=(SIDE, SIDE))
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "PNG")
        chats.append(Chat(file.getvalue(), tuple(question.text for question in ask(scene, rng, turns))))
    return chats
