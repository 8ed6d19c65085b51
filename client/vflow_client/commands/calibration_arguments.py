"""Arguments for the data that strategies are measured on."""

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
    """Declares `--data` and `--live`, one of which may be `required`, and how much of the data is used."""
    samples = parser.add_argument_group("samples to measure strategies on")
    source = samples.add_mutually_exclusive_group(required=required)
    source.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"folder of pictures with a file {QUESTIONS_FILE}; each line is an object with image and question; the "
        "lines of one image are the turns of one conversation",
    )
    source.add_argument(
        "--live",
        type=at_least(0),
        nargs="?",
        const=0,
        metavar="N",
        help="the latest N conversations of the service (default: all); it must run with --calibration-samples",
    )
    samples.add_argument(
        "--pictures",
        type=at_least(1),
        default=32,
        metavar="N",
        help="use the first N pictures of the data (default: 32)",
    )
    samples.add_argument(
        "--questions",
        type=at_least(1),
        default=8,
        metavar="N",
        help="use the first N questions about each picture (default: 8)",
    )


def calibration_of(arguments: argparse.Namespace) -> list[Sample] | LiveTraffic | None:
    """The data that the parsed `arguments` name, or None.

    Raises:
        OSError: the folder's questions cannot be read.
        ValueError: the questions are malformed.
    """
    if arguments.data is not None:
        return load_samples(arguments.data, pictures=arguments.pictures, questions=arguments.questions)
    return None if arguments.live is None else LiveTraffic(max_samples=arguments.live)


@contextmanager
def naming_rejected_picture(source: list[Sample] | LiveTraffic) -> Iterator[None]:
    """Wraps a call that sends `source`. The service names a bad picture by its index, a person needs its file.

    Raises:
        ValueError: the service rejected a picture; the message names its file.
    """
    try:
        yield
    except PictureRejected as error:
        sample = _FIELD_OF_SAMPLE.match(next(iter(error.fields), ""))
        if sample is None or isinstance(source, LiveTraffic):
            raise
        raise ValueError(f"{source[int(sample[1])].image!s}: {error}") from error


def describe_calibration(source: list[Sample] | LiveTraffic) -> str:
    """The size of `source`, for people."""
    if isinstance(source, LiveTraffic):
        return f"the latest {source.max_samples} conversations" if source.max_samples else "all live traffic"
    return f"{counted(len(source), 'picture')}, {counted(sum(len(sample.questions) for sample in source), 'question')}"
