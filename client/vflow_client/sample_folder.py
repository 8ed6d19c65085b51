"""Samples as files: a folder of pictures with their questions."""

import json
import os
from pathlib import Path

from vflow_client.calibration import Sample

QUESTIONS_FILE = "questions.jsonl"


def load_samples(
    folder: str | os.PathLike[str], *, pictures: int | None = None, questions: int | None = None
) -> list[Sample]:
    """Reads a folder of pictures with a file `questions.jsonl`.

    Each line is an object with `image` (a file in the folder) and `question`; other keys, such as `answer`, are
    ignored. The lines of one image are the turns of one conversation, in order. The pictures themselves are read when
    the samples are sent.

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
    path = Path(folder) / QUESTIONS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            image, question = _read(line, f"{path}, line {number}")
            picture = Path(folder) / image
            if picture not in questions_of and not picture.is_file():
                raise ValueError(f"{path}, line {number}: there is no picture {image!r} in the folder")
            questions_of.setdefault(picture, []).append(question)
    if not questions_of:
        raise ValueError(
            f'{path}: no questions; expected lines such as {{"image": "1.png", "question": "What is it?"}}'
        )
    return [Sample(picture, tuple(turns[:questions])) for picture, turns in list(questions_of.items())[:pictures]]


def _read(line: str, where: str) -> tuple[str, str]:
    """The image and the question of one line; `where` names the line in errors."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object with image and question, got {line[:80]!r}")
    for name in ("image", "question"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise ValueError(f"{where}: expected a text as {name!r}, got {fields.get(name)!r}")
    return fields["image"], fields["question"]
