import numpy as np

from demo_model.anyres import SIDE, TILE
from demo_model.labels import HEADS, IGNORE, PLACES, label, place_of
from demo_model.scene import COLOURS, LETTERS, SHAPES, generate

NAMES = list(HEADS)


def test_places_are_the_thirds_of_the_picture() -> None:
    assert PLACES[place_of((10, 10), 300, 300)] == "top left"
    assert PLACES[place_of((150, 150), 300, 300)] == "center"
    assert PLACES[place_of((290, 150), 300, 300)] == "right"
    assert PLACES[place_of((150, 299.9), 300, 300)] == "bottom"


def test_the_patch_at_an_objects_centre_is_labelled_with_it() -> None:
    scene = generate(5, size=(448, 448))
    labels = label(scene).labels
    for item in scene.objects:
        if item.small or item.shape == "moon":  # a moon's centre is not on it
            continue
        x, y = item.centre
        tile = 1 + int(y) // TILE * 2 + int(x) // TILE
        patch = int(y) % TILE // 14 * SIDE + int(x) % TILE // 14
        shape, colour, letter = (labels[tile, NAMES.index(name), patch] for name in ("shape", "colour", "letter"))
        assert shape in (1 + SHAPES.index(item.shape), IGNORE)
        assert colour == 1 + list(COLOURS).index(item.colour)
        assert letter in (0 if item.code is None else 1 + LETTERS.index(item.code[0]), IGNORE)
        assert labels[tile, NAMES.index("centre"), patch] == 1


def test_codes_are_asked_only_where_they_can_be_read() -> None:
    for seed in range(4):
        scene = generate(seed, crowded=True)
        cut = label(scene)
        assert cut.pixels.shape == (len(cut.labels), TILE, TILE, 3)
        assert (cut.labels[0, NAMES.index("letter")] <= 0).all()
        for name, classes in HEADS.items():
            values = cut.labels[:, NAMES.index(name)]
            assert ((values == IGNORE) | ((values >= 0) & (values < classes))).all()
        assert (cut.labels[1:, NAMES.index("place")] == IGNORE).all()


def test_padding_is_not_labelled() -> None:
    labels = label(generate(2, size=(448, 336))).labels
    upper = labels[1].reshape(len(HEADS), SIDE, SIDE)
    assert (upper[:, :4] == IGNORE).all()
    assert not (upper[NAMES.index("tint"), 4:] == IGNORE).any()
    assert np.isin(upper[NAMES.index("centre"), 4:], (0, 1)).all()
