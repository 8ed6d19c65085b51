"""Reads a Calibration message: the samples that it contains, or the live samples that it asks for."""

from __future__ import annotations

from collections.abc import Sequence

from vflow_client.v1 import strategies_pb2
from vflow_server.images.pixel_bound import PixelBound
from vflow_server.images.store import PictureStore
from vflow_server.rpc.errors import InvalidRequest
from vflow_server.servicers.chat_request import MOST_TEXT
from vflow_server.sessions.live_samples import LiveSamples
from vflowopt.search.calibration import Sample

MOST_SAMPLES, MOST_QUESTIONS = 256, 8


class CalibrationReader:
    """Reads the calibration samples of requests.

    Args:
        pictures: decodes their pictures.
        live: the samples of live traffic.
    """

    def __init__(self, pictures: PictureStore, live: LiveSamples) -> None:
        self._pictures = pictures
        self._live = live

    async def read(self, calibration: strategies_pb2.Calibration, tenant: str) -> list[Sample]:
        """The samples of ``calibration`` in a request of ``tenant``. Live samples are removed from the collection.

        Raises:
            ServiceError: a field is not valid, a picture cannot be decoded, or there are no live samples.
        """
        match calibration.WhichOneof("source"):
            case "samples":
                return await self._brought(calibration.samples.samples, tenant)
            case "live":
                if (most := calibration.live.max_samples) < 0:
                    raise InvalidRequest(
                        "OPTION_OUT_OF_RANGE",
                        "calibration.live.max_samples",
                        f"max_samples is {most}; give how many to use at most, or 0 for all",
                        metadata={"value": most, "min": 0},
                    )
                return self._live.pop(tenant, most)
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE", "calibration", "give samples to calibrate on, or ask for those of live traffic"
        )

    async def _brought(self, samples: Sequence[strategies_pb2.CalibrationSample], tenant: str) -> list[Sample]:
        path = "calibration.samples.samples"
        _check_count(path, len(samples), MOST_SAMPLES, "samples")
        for index, sample in enumerate(samples):
            _check_questions(f"{path}[{index}].questions", sample.questions)
        read: list[Sample] = []
        pixels = PixelBound(
            self._pictures.limits, "scale them down, which costs little as the model sees them small, or send fewer"
        )
        for index, sample in enumerate(samples):
            field = f"{path}[{index}].image"
            picture = await self._pictures.acquire(sample.image, field, tenant)
            pixels.count(picture, field)
            read.append(Sample(picture, tuple(sample.questions)))
        return read


def _check_questions(field: str, questions: Sequence[str]) -> None:
    _check_count(field, len(questions), MOST_QUESTIONS, "questions")
    for index, question in enumerate(questions):
        if not question.strip():
            raise InvalidRequest("OPTION_OUT_OF_RANGE", f"{field}[{index}]", "the question is empty; ask something")
        if len(question) > MOST_TEXT:
            raise InvalidRequest(
                "OPTION_OUT_OF_RANGE",
                f"{field}[{index}]",
                f"the question has {len(question)} characters; send at most {MOST_TEXT}",
                metadata={"value": len(question), "max": MOST_TEXT},
            )


def _check_count(field: str, count: int, most: int, what: str) -> None:
    if not 1 <= count <= most:
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            field,
            f"there are {count} {what}; give 1 to {most}",
            metadata={"value": count, "min": 1, "max": most},
        )
