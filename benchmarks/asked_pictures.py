"""Pictures with questions and true answers: the embedded model's held-out pictures, or a folder of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demo_model.questions import held_out
from vflow_client.sample_folder import read_questions
from vflowopt.media.picture import Picture
from vflowopt.media.video import Visual

_HELD_OUT_SEED = 7_000_000
"""Far from the seeds that training draws and from those that the embedded model was evaluated on while it was made."""


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        text: as a person would type it.
        answer: the true answer; empty if it is not known.
        groups: the groups in which its answer is also counted.
    """

    text: str
    answer: str
    groups: tuple[str, ...] = ()

    def answered_by(self, answer: str) -> bool:
        """Whether an answer is the true one, case and space around it aside."""
        return answer.strip().casefold() == self.answer.strip().casefold()


@dataclass(frozen=True, eq=False)
class AskedPicture:
    """A picture, or a video, and what is asked about it, in the order of the turns of a conversation."""

    picture: Visual
    questions: tuple[Asked, ...]


def generated(seed: int, pictures: int, questions: int) -> Iterator[AskedPicture]:
    """Held-out pictures of the embedded model with questions of every kind; the group ``fine`` asks for fine detail.

    Args:
        seed: which pictures; different seeds give different pictures.
        pictures: how many.
        questions: the most questions about each.
    """
    for scene, about in held_out(_HELD_OUT_SEED + seed * 100_000, pictures, questions):
        asked = [Asked(each.text, each.answer, (each.kind, "fine") if each.fine else (each.kind,)) for each in about]
        if asked:  # a scene may hold nothing that can be asked about without ambiguity
            yield AskedPicture(Picture.from_pixels(scene.image), tuple(asked))


def from_folder(folder: Path, pictures: int, questions: int) -> Iterator[AskedPicture]:
    """Read a folder of pictures with a file ``questions.jsonl``, as :func:`vflow_client.load_samples` does.

    Args:
        folder: where they are.
        pictures: how many are read at most.
        questions: about each, at most.

    Raises:
        ValueError: a line is not of that form; it is named.
        OSError: a file cannot be read.
        PictureError: a file is no usable picture.
    """
    asked: dict[Path, list[Asked]] = {}
    for line in read_questions(folder):
        groups = () if line.group is None else (line.group,)
        asked.setdefault(line.picture, []).append(Asked(line.question, line.answer or "", groups))
    for picture, about in list(asked.items())[:pictures]:
        yield AskedPicture(Picture.decode(picture.read_bytes()), tuple(about[:questions]))
