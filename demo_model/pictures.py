"""Draw the bundled pictures and their questions: ``python -m demo_model.pictures``.

Chosen by how they look, on held-out photographs, before any model had seen them.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from demo_model.questions import Question, ask
from demo_model.scene import Scene, generate
from vflowopt.demo import picture_path

_PICTURES = {
    "cat.png": (9_000_003, (448, 448)),
    "photographer.png": (9_000_001, (672, 224)),
    "gravel.png": (9_000_009, (336, 448)),
}
"""Seed and size of each."""

_KINDS = ("code", "colour", "place", "existence", "shape", "background")
"""Which kinds are asked about a picture: the first five of these that it carries."""


def _questions(scene: Scene, seed: int) -> list[Question]:
    """The first question that the seed draws of each of five kinds."""
    drawn = ask(scene, np.random.default_rng(seed), 40)
    first = {question.kind: question for question in reversed(drawn)}
    return [first[kind] for kind in _KINDS if kind in first][:5]


def draw(folder: Path) -> None:
    """Write the pictures and ``questions.json`` to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {}
    for name, (seed, size) in _PICTURES.items():
        scene = generate(seed, held_out=True, size=size)
        Image.fromarray(scene.image).save(folder / name, optimize=True)
        about[name] = [
            {"question": question.text, "answer": question.answer, "kind": question.kind}
            for question in _questions(scene, seed)
        ]
    (folder / "questions.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    draw(picture_path())
