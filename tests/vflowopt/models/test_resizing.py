"""Large pictures are resized in pieces, to the same bits as the image processors of Hugging Face do it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.vflowopt.generation import picture
from tests.vflowopt.models.test_detail import SMALL_MODELS
from vflowopt.compression.pieces import Pieces, whole
from vflowopt.media.picture import Detail, Picture
from vflowopt.models import resizing
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.loading import load_model
from vflowopt.models.resizing import for_large, in_pieces

SIZES = ((640, 560), (300, 1100))


@pytest.fixture(scope="module", params=SMALL_MODELS, ids=lambda model: model.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MultimodalModel]:
    yield load_model(request.param.save(tmp_path_factory.mktemp(request.param.name)))


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every picture a large one."""
    monkeypatch.setattr(resizing, "LARGE_PIXELS", 100_000)


def count(pieces: Pieces[np.ndarray]) -> tuple[int, np.ndarray]:
    """How often the work paused, and its result."""
    pauses = 0
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return pauses, end.value
        pauses += 1


@pytest.mark.parametrize("detail", ["high", "low"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_family_sees_the_same_pixels(
    model: MultimodalModel, size: tuple[int, int], detail: Detail, monkeypatch: pytest.MonkeyPatch, all_large: None
) -> None:
    shown = Picture(picture(*size, seed=5), "a", detail)
    cut = getattr(model, "tiles", None) or model.resized
    monkeypatch.setattr(resizing, "LARGE_PIXELS", 1 << 60)
    expected = cut(shown)
    monkeypatch.setattr(resizing, "LARGE_PIXELS", 100_000)
    assert np.array_equal(cut(shown), expected), "not in pieces"
    pauses, seen = count(in_pieces(model.processor, lambda: cut(shown)))
    assert np.array_equal(seen, expected)
    assert pauses >= 1


def test_pictures_may_be_resized_between_the_pieces_of_another(model: MultimodalModel, all_large: None) -> None:
    first, second = (Picture(picture(*size, seed=6), str(size)) for size in SIZES)
    cut = getattr(model, "tiles", None) or model.resized
    expected = [cut(first), cut(second)]
    pieces = in_pieces(model.processor, lambda: cut(first))
    next(pieces)
    assert np.array_equal(whole(in_pieces(model.processor, lambda: cut(second))), expected[1])
    assert np.array_equal(cut(second), expected[1])
    assert np.array_equal(whole(pieces), expected[0])


def test_a_processor_keeps_its_name_and_configuration(model: MultimodalModel, all_large: None) -> None:
    before = model.processor.to_dict()
    cut = getattr(model, "tiles", None) or model.resized
    whole(in_pieces(model.processor, lambda: cut(Picture(picture(*SIZES[0], seed=5), "a"))))
    assert model.processor.to_dict() == before
    assert for_large(model.processor) is model.processor


def test_a_processor_of_another_backend_is_left_alone(tmp_path: Path) -> None:
    other = object()
    assert for_large(other) is other
    assert whole(in_pieces(other, lambda: 3)) == 3
