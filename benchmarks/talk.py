"""What is talked about in a benchmark: a picture of one's own, and questions about it in turn."""

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
class Talk:
    """One conversation to hold.

    Attributes:
        picture: a PNG file's bytes; no two talks have the same.
        questions: one for each turn; the picture belongs to the first.
    """

    picture: bytes
    questions: tuple[str, ...]


def draw_talks(count: int, *, turns: int, seed: int) -> list[Talk]:
    """Draw ``count`` talks of ``turns`` turns. Equal seeds draw equal talks; different ones share no picture."""
    talks = []
    for number in tqdm(range(count), desc="drawing pictures", unit="picture", leave=False, disable=None):
        rng = np.random.default_rng([seed, number])
        scene = generate(int(rng.integers(1 << 31)), held_out=True, size=(SIDE, SIDE))
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "PNG")
        talks.append(Talk(file.getvalue(), tuple(question.text for question in ask(scene, rng, turns))))
    return talks
