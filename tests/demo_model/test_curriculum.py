import numpy as np
import pytest

from demo_model.anyres import SIDE, token_sources
from demo_model.curriculum import OVERVIEW, scattered, window
from demo_model.features import CachedPicture
from demo_model.scene import generate


def cached(size: tuple[int, int]) -> CachedPicture:
    return CachedPicture(generate(4, size=size), 0, int((token_sources(*size) >= 0).sum()))


@pytest.mark.parametrize("size", [(448, 448), (300, 400), (672, 224), (224, 224)])
@pytest.mark.parametrize("mosaic", [12, 150, 900])
def test_a_window_is_a_rectangle_of_the_mosaic(size: tuple[int, int], mosaic: int) -> None:
    picture = cached(size)
    sources = token_sources(*size)
    newlines = np.flatnonzero(sources < 0)
    columns = int(newlines[0]) - OVERVIEW
    chosen = window(np.random.default_rng(1), picture, 40, mosaic)
    assert np.all(np.diff(chosen) > 0)
    assert np.sum(chosen < OVERVIEW) == 40
    assert chosen[-1] < picture.count
    rows, places = np.divmod(chosen[chosen >= OVERVIEW] - OVERVIEW, columns)
    height, width = np.ptp(rows) + 1, np.ptp(places) + 1
    assert height * width == np.sum(chosen >= OVERVIEW)
    if mosaic <= 150:
        assert 0.4 * min(mosaic, picture.count - OVERVIEW) <= height * width <= 1.5 * mosaic


def test_scattered_tokens_are_as_many_as_asked_for_where_there_are_so_many() -> None:
    picture = cached((224, 224))
    chosen = scattered(np.random.default_rng(1), picture, 100, 5000)
    assert np.sum(chosen < OVERVIEW) == 100
    assert np.sum(chosen >= OVERVIEW) == picture.count - SIDE * SIDE
