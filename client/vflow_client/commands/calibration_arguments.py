"""What a command measures strategies on."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vflow_client.calibration import Sample
from vflow_client.commands.whole_number import at_least
from vflow_client.errors import PictureRejected
from vflow_client.quantities import counted
from vflow_client.sample_folder import QUESTIONS_FILE, load_samples
from vflow_client.v1.strategies_pb2 import LiveTraffic

_FIELD_OF_SAMPLE = re.compile(r"calibration\.samples\.samples\[(\d+)\]")


def add_calibration_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Declares `--data` or `--live`, one of which may be `required`, and how much of the data is used."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"folder of pictures with a file {QUESTIONS_FILE}: for each question a line, an object with image and "
        "question; the lines of one image are the turns of one conversation",
    )
    source.add_argument(
        "--live",
        type=at_least(0),
        nargs="?",
        const=0,
        metavar="N",
        help="the latest N conversations (default: all) that the service held; it must run with --calibration-samples",
    )
    parser.add_argument(
        "--pictures", type=at_least(1), default=32, metavar="N", help="of the data at most (default: the first 32)"
    )
    parser.add_argument(
        "--questions",
        type=at_least(1),
        default=8,
        metavar="N",
        help="about each picture at most, the first (default: 8)",
    )


def calibration_of(arguments: argparse.Namespace) -> list[Sample] | LiveTraffic | None:
    """What the parsed `arguments` name, or None.

    Raises:
        OSError: the folder's questions cannot be read.
        ValueError: they are not of the form that they must have.
    """
    if arguments.data is not None:
        return load_samples(arguments.data, pictures=arguments.pictures, questions=arguments.questions)
    return None if arguments.live is None else LiveTraffic(max_samples=arguments.live)


@contextmanager
def pictures_named(source: list[Sample] | LiveTraffic) -> Iterator[None]:
    """Around a call that sends `source`: the service knows its pictures by their places, a person by their files.

    Raises:
        ValueError: the service takes one of the pictures for none; its file is named.
    """
    try:
        yield
    except PictureRejected as error:
        sample = _FIELD_OF_SAMPLE.match(next(iter(error.fields), ""))
        if sample is None or isinstance(source, LiveTraffic):
            raise
        raise ValueError(f"{source[int(sample[1])].image!s}: {error}") from error


def describe_calibration(source: list[Sample] | LiveTraffic) -> str:
    """How much there is of it."""
    if isinstance(source, LiveTraffic):
        return f"the latest {source.max_samples} conversations held" if source.max_samples else "all live traffic held"
    return f"{counted(len(source), 'picture')}, {counted(sum(len(sample.questions) for sample in source), 'question')}"
