"""Dense labels: what each patch of each tile shows, for training the vision tower.

A scene's instance map goes through the same geometry as its pixels. It uses neither torch nor a model.
"""

from dataclasses import dataclass

import numpy as np

from demo_model.anyres import PATCH, SIDE, TILE, layout, tiles
from demo_model.scene import COLOURS, DIGITS, LETTERS, SHAPES, TINTS, Scene

IGNORE = -100
"""Label of a patch about which nothing is asked."""

HEADS = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "letter": 1 + len(LETTERS),
    "digit": 1 + len(DIGITS),
    "place": 9,
    "alike": 5,
    "centre": 2,
    "tint": len(TINTS),
}
"""Classes per label.

Class 0 of shape, colour, letter and digit means none. The letter and the digit of a code are asked of the patches that
show that half of the plate. ``place`` is the third of the picture, row by row, and ``alike`` how many objects of the
picture share the shape (five and more are one class); both are asked only in the overview.
"""

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

_SHAPE, _COLOUR, _LETTER, _DIGIT, _PLACE, _ALIKE, _CENTRE, _TINT = range(len(HEADS))

_SHOWN = 30
"""Pixels of an object from which a patch counts as showing it; fewer, but some, and the patch is ignored."""

_RECOGNISABLE = 0.4
"""Share of an object that a tile must show for its shape to be asked."""


@dataclass(frozen=True)
class LabelledTiles:
    """Tiles of one picture and the labels of their patches.

    Attributes:
        pixels: uint8 of shape (tiles, 224, 224, 3); the overview comes first.
        labels: int8 of shape (tiles, heads, 256), heads in the order of ``HEADS``.
    """

    pixels: np.ndarray
    labels: np.ndarray


def place_of(centre: tuple[float, float], width: int, height: int) -> int:
    """Index into ``PLACES`` of a point of a picture."""
    return 3 * min(int(3 * centre[1] / height), 2) + min(int(3 * centre[0] / width), 2)


def _coverage(ids: np.ndarray, count: int) -> np.ndarray:
    """Pixels of every object in every patch, (256, 1 + count), out of a tile's (224, 224) map of ids."""
    patches = ids.reshape(SIDE, PATCH, SIDE, PATCH).swapaxes(1, 2).reshape(SIDE * SIDE, -1).astype(np.int64)
    bins = patches + np.arange(SIDE * SIDE)[:, None] * (count + 1)
    return np.bincount(bins.reshape(-1), minlength=SIDE * SIDE * (count + 1)).reshape(SIDE * SIDE, count + 1)


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class _View:
    """How a tile sees the picture: its pixels per pixel of the picture, and where the corner of the picture falls."""

    scale_x: float
    scale_y: float
    left: float
    top: float

    def patch(self, point: tuple[float, float]) -> int | None:
        """The patch that shows a point of the picture, if the tile does."""
        x, y = self.left + point[0] * self.scale_x, self.top + point[1] * self.scale_y
        return int(y) // PATCH * SIDE + int(x) // PATCH if 0 <= x < TILE and 0 <= y < TILE else None

    def overlap(self, box: Box) -> np.ndarray:
        """Pixels of every patch that lie in a box of the picture, (256,)."""
        starts = np.arange(SIDE) * PATCH
        left, right = (self.left + x * self.scale_x for x in (box[0], box[2]))
        top, bottom = (self.top + y * self.scale_y for y in (box[1], box[3]))
        across = np.minimum(starts + PATCH, right) - np.maximum(starts, left)
        down = np.minimum(starts + PATCH, bottom) - np.maximum(starts, top)
        return np.outer(down.clip(0), across.clip(0)).reshape(-1)


def _views(width: int, height: int) -> list[_View]:
    """The overview and the mosaic tiles of a picture."""
    plan = layout(width, height)
    scale_x, scale_y = plan.content_width / width, plan.content_height / height
    mosaic = [
        _View(scale_x, scale_y, plan.left - column * TILE, plan.top - row * TILE)
        for row in range(plan.rows)
        for column in range(plan.columns)
    ]
    return [_View(TILE / width, TILE / height, 0, 0), *mosaic]


def _traits(scene: Scene) -> np.ndarray:
    """What is known of a whole object wherever it is seen, (1 + objects, heads); row 0 is the background."""
    traits = np.full((1 + len(scene.objects), len(HEADS)), IGNORE)
    traits[0, :4] = 0
    traits[:, _CENTRE] = 0
    traits[:, _TINT] = list(TINTS).index(scene.tint)
    shapes = [item.shape for item in scene.objects]
    for index, item in enumerate(scene.objects, 1):
        traits[index, _SHAPE] = 1 + SHAPES.index(item.shape)
        traits[index, _COLOUR] = 1 + list(COLOURS).index(item.colour)
        if item.code is None:
            traits[index, [_LETTER, _DIGIT]] = 0
        traits[index, _PLACE] = place_of(item.centre, *scene.size)
        traits[index, _ALIKE] = min(shapes.count(item.shape), HEADS["alike"]) - 1
    return traits


def _label_codes(labels: np.ndarray, scene: Scene, view: _View) -> None:
    """Label the halves of the plates with their characters."""
    for item in scene.objects:
        if item.code is not None and item.plate is not None:
            left, top, right, bottom = item.plate
            middle = (left + right) / 2
            labels[_LETTER, view.overlap((left, top, middle, bottom)) >= _SHOWN] = 1 + LETTERS.index(item.code[0])
            labels[_DIGIT, view.overlap((middle, top, right, bottom)) >= _SHOWN] = 1 + DIGITS.index(item.code[1])


def label(scene: Scene) -> LabelledTiles:
    """Cut a scene into tiles and label every patch."""
    traits = _traits(scene)
    coverage = np.stack([_coverage(ids, len(scene.objects)) for ids in tiles(scene.instances, labels=True)])
    in_mosaic = coverage[1:].sum((0, 1))
    labels = np.empty((len(coverage), len(HEADS), SIDE * SIDE), np.int8)
    for tile, view in enumerate(_views(*scene.size)):
        objects = coverage[tile, :, 1:]
        owner = np.where(objects.max(1) >= _SHOWN, 1 + objects.argmax(1), 0)
        labels[tile] = traits[owner].T
        labels[tile, :4, (owner == 0) & (objects.sum(1) > 0)] = IGNORE
        if tile:
            labels[tile, [_PLACE, _ALIKE]] = IGNORE
            _label_codes(labels[tile], scene, view)
            sliver = coverage[tile].sum(0) < _RECOGNISABLE * in_mosaic
            sliver[0] = False
            labels[tile, _SHAPE, sliver[owner]] = IGNORE
        for item in scene.objects:
            patch = view.patch(item.centre)
            if patch is not None:
                labels[tile, _CENTRE, patch] = 1
        padding = view.overlap((0, 0, *scene.size)) < PATCH * PATCH / 2
        labels[tile][:, padding] = IGNORE
    return LabelledTiles(tiles(scene.image), labels)
