"""The data that strategies are measured on: samples of the caller, or live traffic of the service."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vflow_client.image_source import ImageSource, to_image
from vflow_client.v1.strategies_pb2 import Calibration, CalibrationSample, CalibrationSamples, LiveTraffic


@dataclass(frozen=True)
class Sample:
    """One picture with questions about it.

    Attributes:
        image: a path, the bytes of a picture file, a PIL image, or `Image(digest=...)`.
        questions: the turns of one conversation about the picture, 1 to 8. A search can optimise later turns only if
            there are some.
    """

    image: ImageSource
    questions: Sequence[str]

    def __post_init__(self) -> None:
        """Raises TypeError if `questions` is a single text, which would be read as one question per character."""
        if isinstance(self.questions, str):
            raise TypeError(f"questions must be a sequence of texts, got one text: write [{self.questions!r}]")


CalibrationSource: TypeAlias = Iterable[Sample] | LiveTraffic
"""Samples of the caller (1 to 256; about 30 are enough for a search), or `LiveTraffic(max_samples=...)`: recent
conversations, if the operator of the service lets it record them."""


def to_calibration(source: CalibrationSource) -> Calibration:
    """The message for `source`; reads the files of the pictures.

    Raises:
        OSError: a picture's path that cannot be read.
        TypeError: a picture that is no `ImageSource`.
    """
    if isinstance(source, LiveTraffic):
        return Calibration(live=source)
    samples = [CalibrationSample(image=to_image(sample.image), questions=sample.questions) for sample in source]
    return Calibration(samples=CalibrationSamples(samples=samples))
