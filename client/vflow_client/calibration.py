"""What strategies are measured on: pictures with questions of the caller's own, or the service's live traffic."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vflow_client.image_source import ImageSource, to_image
from vflow_client.v1.strategies_pb2 import Calibration, CalibrationSample, CalibrationSamples, LiveTraffic


@dataclass(frozen=True)
class Sample:
    """One picture and what is asked about it.

    Attributes:
        image: a path, the bytes of a picture file, a PIL image, or `Image(digest=...)`.
        questions: the turns of one conversation about the picture, 1 to 8. A search serves later turns as well as
            first ones only where there are some.
    """

    image: ImageSource
    questions: Sequence[str]

    def __post_init__(self) -> None:
        """Raises TypeError where `questions` is one text, which would be taken for a question per character."""
        if isinstance(self.questions, str):
            raise TypeError(f"questions must be a sequence of texts, got one text: write [{self.questions!r}]")


CalibrationSource: TypeAlias = Iterable[Sample] | LiveTraffic
"""Samples of the caller's own (1 to 256, about 30 are enough for a search), or `LiveTraffic(max_samples=...)`:
conversations that the service held lately, where its operator lets it keep some."""


def to_calibration(source: CalibrationSource) -> Calibration:
    """The message for `source`, with the pictures read.

    Raises:
        OSError: a picture's path that cannot be read.
        TypeError: a picture in none of the forms of `ImageSource`.
    """
    if isinstance(source, LiveTraffic):
        return Calibration(live=source)
    samples = [CalibrationSample(image=to_image(sample.image), questions=sample.questions) for sample in source]
    return Calibration(samples=CalibrationSamples(samples=samples))
