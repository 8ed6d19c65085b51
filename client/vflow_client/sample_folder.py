"""Samples as files: a folder of pictures with their questions."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from vflow_client.calibration import Sample

QUESTIONS_FILE = "questions.jsonl"


@dataclass(frozen=True)
class QuestionLine:
    """One line of the file.

    Attributes:
        picture: the file that the question is about.
        question: the question.
        answer: the true answer, which a search does not need; None if it is not given.
        group: the group in which comparisons count it, too; None if it is in none.
    """

    picture: Path
    question: str
    answer: str | None = None
    group: str | None = None


def load_samples(
    folder: str | os.PathLike[str], *, pictures: int | None = None, questions: int | None = None
) -> list[Sample]:
    """Reads a folder of pictures with a file `questions.jsonl`.

    Each line is an object with `image` (a file in the folder) and `question`; `answer`, the true answer, and `group`
    are for comparisons, and other keys are ignored. The lines of one image are the turns of one conversation, in order.
    The pictures themselves are read when the samples are sent.

    Args:
        folder: the folder.
        pictures: largest number of pictures, the first in the file; None: all.
        questions: largest number of questions about each picture; None: all.

    Raises:
        OSError: `questions.jsonl` cannot be read.
        ValueError: the file is not UTF-8 or has no questions, or a line is malformed or names a missing picture; the
            message names file and line.
    """
    questions_of: dict[Path, list[str]] = {}
    for line in read_questions(folder):
        questions_of.setdefault(line.picture, []).append(line.question)
    return [Sample(picture, tuple(turns[:questions])) for picture, turns in list(questions_of.items())[:pictures]]


def read_questions(folder: str | os.PathLike[str]) -> list[QuestionLine]:
    """Reads the lines of a folder's `questions.jsonl`, at least one; see `load_samples`."""
    path = Path(folder) / QUESTIONS_FILE
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
    read: list[QuestionLine] = []
    known: set[Path] = set()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            asked = _read(line, Path(folder), f"{path}, line {number}")
            if asked.picture not in known and not asked.picture.is_file():
                raise ValueError(f"{path}, line {number}: there is no picture {asked.picture.name!r} in the folder")
            known.add(asked.picture)
            read.append(asked)
    if not read:
        raise ValueError(
            f'{path}: no questions; expected lines such as {{"image": "1.png", "question": "What is it?"}}'
        )
    return read


def _read(line: str, folder: Path, where: str) -> QuestionLine:
    """One line; `where` names it in errors."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object with image and question, got {line[:80]!r}")
    for name in ("image", "question"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise ValueError(f"{where}: expected a text as {name!r}, got {fields.get(name)!r}")
    return QuestionLine(
        folder / fields["image"], fields["question"], _optional(fields, "answer"), _optional(fields, "group")
    )


def _optional(fields: dict[str, object], name: str) -> str | None:
    """A text or, as people write `"answer": 3`, a number."""
    return None if fields.get(name) is None else str(fields[name])
