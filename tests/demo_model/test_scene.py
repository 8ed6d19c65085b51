import numpy as np
import pytest

from demo_model.anyres import layout
from demo_model.scene import (
    COLOURS,
    DIGITS,
    HELD_OUT_PHOTOGRAPHS,
    LETTERS,
    SHAPES,
    SIZES,
    TRAINING_PHOTOGRAPHS,
    Scene,
    generate,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [generate(seed) for seed in range(12)] + [generate(seed, crowded=True) for seed in range(3)]


def test_a_seed_gives_one_scene() -> None:
    first, again, other = generate(7), generate(7), generate(8)
    assert first.objects == again.objects and first.tint == again.tint
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image.shape, other.image.shape) or not np.array_equal(first.image, other.image)


def test_held_out_scenes_are_others_on_other_photographs() -> None:
    assert not set(TRAINING_PHOTOGRAPHS) & set(HELD_OUT_PHOTOGRAPHS)
    for seed in range(6):
        assert generate(seed).photograph in TRAINING_PHOTOGRAPHS
        assert generate(seed, held_out=True).photograph in HELD_OUT_PHOTOGRAPHS
        assert generate(seed).objects != generate(seed, held_out=True).objects


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_drawn_as_asked(size: tuple[int, int]) -> None:
    scene = generate(3, size=size)
    assert scene.size == size
    assert scene.image.shape == (size[1], size[0], 3) and scene.image.dtype == np.uint8
    assert scene.instances.shape == (size[1], size[0])


def test_objects_are_named_visible_and_apart(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.objects
        for number, item in enumerate(scene.objects, 1):
            assert item.shape in SHAPES and item.colour in COLOURS
            left, top, right, bottom = item.box
            assert 0 <= left < right <= scene.size[0] and 0 <= top < bottom <= scene.size[1]
            rows, columns = np.nonzero(scene.instances == number)
            assert len(rows) >= 100
            assert columns.min() >= left and columns.max() < right and rows.min() >= top and rows.max() < bottom


def test_plates_lie_inside_one_tile_and_carry_the_code(scenes: list[Scene]) -> None:
    plates = 0
    for scene in scenes:
        for item in scene.objects:
            assert (item.plate is None) == (item.code is None)
            if item.plate is None or item.code is None:
                continue
            plates += 1
            assert layout(*scene.size).in_one_tile(item.plate)
            assert item.code[0] in LETTERS and item.code[1] in DIGITS
            left, top, right, bottom = item.plate
            plate = scene.image[top:bottom, left:right].mean(-1)
            assert (plate > 200).mean() > 0.3 and (plate < 80).mean() > 0.1
    assert plates > 10


def test_an_unknown_photograph_package_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    from demo_model import scene

    monkeypatch.setattr(scene, "find_spec", lambda name: None)
    scene._photograph.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-image"):
        generate(0)


def test_distinct_scenes_show_every_shape_once_and_many_codes() -> None:
    scenes = [generate(seed, distinct=True) for seed in range(12)]
    for scene in scenes:
        assert len({item.shape for item in scene.objects}) == len(scene.objects)
        assert not any(item.small for item in scene.objects)
    codes = sum(item.code is not None for scene in scenes for item in scene.objects)
    assert codes > 0.5 * sum(len(scene.objects) for scene in scenes)
