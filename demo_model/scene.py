"""Pictures of the embedded model: coloured shapes on tinted photographs, some with a small plate that carries a code.

A scene is a pure function of its seed. It uses neither questions nor labels nor models.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo_model.anyres import layout

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "moon", "arrow", "hourglass")
COLOURS = {
    "red": (214, 38, 38),
    "orange": (246, 136, 28),
    "yellow": (246, 220, 50),
    "green": (52, 164, 66),
    "cyan": (70, 208, 216),
    "blue": (44, 82, 206),
    "purple": (132, 54, 178),
    "pink": (248, 140, 190),
}
TINTS = {
    "grey": (150, 150, 150),
    "red": (176, 120, 114),
    "green": (122, 158, 118),
    "blue": (116, 138, 178),
    "yellow": (172, 160, 102),
    "purple": (150, 122, 166),
}
LETTERS = "CEHLTX"
DIGITS = "3457"
"""Characters of the codes: chosen to be easy to distinguish at 12 pixels."""

SIZES = ((448, 448), (448, 336), (336, 448), (672, 224), (224, 672), (224, 448), (448, 224), (224, 224), (300, 400))
"""Picture sizes (width, height). Half of all pictures have the first."""

TRAINING_PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "cell.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
HELD_OUT_PHOTOGRAPHS = ("camera.png", "chelsea.png", "gravel.png")

_SUPERSAMPLING = 3
_OUTLINE = (26, 24, 28)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape, colour: names out of ``SHAPES`` and ``COLOURS``.
        box: left, top, right, bottom in picture pixels.
        code: letter and digit on its plate, or None.
        plate: the plate's box in picture pixels, or None.
        small: too small to be recognised in the 224 px overview.
    """

    shape: str
    colour: str
    box: tuple[int, int, int, int]
    code: str | None
    plate: tuple[int, int, int, int] | None
    small: bool

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box (x, y) in picture pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A picture and what is on it.

    Attributes:
        image: uint8 of shape (height, width, 3).
        instances: uint8 of shape (height, width): 0 for background, else 1 + the index of the object that covers the
            pixel. objects: what was drawn; objects never overlap. size: width and height in pixels. tint: name of the
            background's tint. photograph: file name of the photograph behind it.
    """

    image: np.ndarray
    instances: np.ndarray
    objects: tuple[SceneObject, ...]
    size: tuple[int, int]
    tint: str
    photograph: str


def _arc(start: float, stop: float, count: int, radius: float = 1.0, x: float = 0.0) -> list[tuple[float, float]]:
    steps = (start + (stop - start) * i / (count - 1) for i in range(count))
    return [(x + radius * cos(a), radius * sin(a)) for a in steps]


def _heart() -> list[tuple[float, float]]:
    steps = (2 * pi * i / 48 for i in range(48))
    return [(16 * sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t))) for t in steps]


def _star() -> list[tuple[float, float]]:
    corners = ((1.0 if i % 2 == 0 else 0.42, pi * i / 5 - pi / 2) for i in range(10))
    return [(r * cos(a), r * sin(a)) for r, a in corners]


@lru_cache(maxsize=1)
def _outlines() -> dict[str, np.ndarray]:
    """Outline of every shape, (points, 2), stretched to fill the square from -1 to 1."""
    arm = 0.34
    polygons = {
        "circle": _arc(0, 2 * pi, 48),
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "star": _star(),
        "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
        "cross": [
            *((-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)),
            *((arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)),
        ],
        "heart": _heart(),
        "moon": [*_arc(0.30 * pi, 1.70 * pi, 40), *_arc(1.62 * pi, 0.38 * pi, 28, 0.86, 0.42)],
        "arrow": [(-1, -0.36), (0.05, -0.36), (0.05, -1), (1, 0), (0.05, 1), (0.05, 0.36), (-1, 0.36)],
        "hourglass": [(-0.9, -1), (0.9, -1), (0.18, 0), (0.9, 1), (-0.9, 1), (-0.18, 0)],
    }
    filled: dict[str, np.ndarray] = {}
    for name, points in polygons.items():
        polygon = np.asarray(points, np.float64)
        low, high = polygon.min(0), polygon.max(0)
        extent = (high - low).max()
        filled[name] = (polygon - (low + high) / 2) * (2 / extent)
    return filled


@lru_cache(maxsize=64)
def _photograph(name: str) -> np.ndarray:
    """Luminance of a photograph of scikit-image's wheel, uint8 (height, width); its package is not imported."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "Generating scenes needs the photographs that come with scikit-image; install it with: "
            "pip install scikit-image"
        )
    with Image.open(Path(spec.origin).parent / "data" / name) as image:
        return np.asarray(image.convert("L"))


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _background(rng: np.random.Generator, size: tuple[int, int], name: str, tint: str) -> np.ndarray:
    photograph = Image.fromarray(_photograph(name))
    width, height = size
    fit = min(photograph.width / width, photograph.height / height)
    scale = fit * rng.uniform(0.45, 1.0)
    crop_width, crop_height = width * scale, height * scale
    left = rng.uniform(0, photograph.width - crop_width)
    top = rng.uniform(0, photograph.height - crop_height)
    crop = photograph.resize(size, Image.Resampling.BILINEAR, (left, top, left + crop_width, top + crop_height))
    light = np.asarray(crop, np.float32) / 255
    if rng.random() < 0.5:
        light = light[:, ::-1]
    light = 0.5 + 0.55 * (light - light.mean()) + rng.uniform(0.1, 0.4)
    colour = np.asarray(TINTS[tint], np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
    pixels: np.ndarray = np.clip(light[..., None] * colour, 0, 255).astype(np.uint8)
    return pixels


def _boxes(rng: np.random.Generator, size: tuple[int, int], sides: list[int]) -> list[tuple[int, int, int, int]]:
    """Non-overlapping boxes with the given sides; those that do not fit are left out."""
    width, height = size
    boxes: list[tuple[int, int, int, int]] = []
    for side in sides:
        stretch = rng.uniform(-0.12, 0.12)
        box_width, box_height = round(side * (1 + stretch)), round(side * (1 - stretch))
        for _ in range(60):
            x = int(rng.integers(2, width - box_width - 2))
            y = int(rng.integers(2, height - box_height - 2))
            if all(
                x + box_width + 4 <= left or right + 4 <= x or y + box_height + 4 <= top or bottom + 4 <= y
                for left, top, right, bottom in boxes
            ):
                boxes.append((x, y, x + box_width, y + box_height))
                break
    return boxes


def _sprite(shape: str, colour: tuple[int, int, int], size: tuple[int, int], angle: float) -> Image.Image:
    """The object as RGBA of ``size``, drawn larger and reduced so that edges are smooth."""
    factor = _SUPERSAMPLING
    width, height = size[0] * factor, size[1] * factor
    turn = np.array([[cos(angle), sin(angle)], [-sin(angle), cos(angle)]])
    points = _outlines()[shape] @ turn
    points = points / np.abs(points).max()
    corners = [(float((x + 1) * (width - 1) / 2), float((y + 1) * (height - 1) / 2)) for x, y in points]
    line = max(2 * factor, round(0.055 * min(width, height)))
    sprite = Image.new("RGBA", (width, height), (*_OUTLINE, 0))
    ImageDraw.Draw(sprite).polygon(corners, fill=(*colour, 255), outline=(*_OUTLINE, 255), width=line)
    return sprite.reduce(factor)


def _plate_box(centre: tuple[float, float], height: int) -> tuple[int, int, int, int]:
    half_width, half_height = height * 0.82, height / 2
    x, y = centre
    return round(x - half_width), round(y - half_height), round(x + half_width), round(y + half_height)


def _draw_plate(canvas: Image.Image, box: tuple[int, int, int, int], code: str) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(250, 250, 246), outline=_OUTLINE)
    font = _font(round((box[3] - box[1]) * 0.92))
    for character, fraction in zip(code, (0.27, 0.73), strict=True):
        x = box[0] + (box[2] - box[0]) * fraction
        y = (box[1] + box[3]) / 2
        draw.text((x, y), character, fill=(8, 8, 12), font=font, anchor="mm", stroke_width=0.4)


def _shapes(rng: np.random.Generator, count: int) -> list[str]:
    """Shapes of ``count`` objects: one group of two, one of three or four where there is room, the others unique."""
    names = list(rng.permutation(SHAPES))
    groups = [2] if count < 6 else [2, 3] if count < 8 else [2, int(rng.integers(3, 5))]
    shapes = [name for name, group in zip(names, groups, strict=False) for _ in range(group)]
    singles = names[len(groups) :]
    while len(shapes) < count:
        shapes.append(singles.pop() if singles else str(rng.choice(SHAPES)))
    return shapes


def generate(
    seed: int,
    *,
    held_out: bool = False,
    crowded: bool = False,
    distinct: bool = False,
    size: tuple[int, int] | None = None,
) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: any non-negative integer; the same seed gives the same scene.
        held_out: draw on the photographs that training never sees, from a stream of random numbers of its own.
        crowded: as many objects as find room; labels for training the vision tower, too full for questions.
        distinct: no two objects share a shape, all are large and carry a code where it finds room: many questions about
            detail for training the language model.
        size: width and height in pixels; by default drawn from ``SIZES``.
    """
    rng = np.random.default_rng([seed, int(held_out), int(crowded) + 2 * int(distinct)])
    if size is None:
        size = SIZES[0] if rng.random() < 0.5 else SIZES[int(rng.integers(1, len(SIZES)))]
    photograph = str(rng.choice(HELD_OUT_PHOTOGRAPHS if held_out else TRAINING_PHOTOGRAPHS))
    tint = str(rng.choice(list(TINTS)))
    area = size[0] * size[1] / (448 * 448)
    if crowded:
        count = round(30 * area)
    elif area < 0.4:
        count = int(rng.integers(5, 7))
    else:
        count = int(rng.integers(7, 10)) if area < 0.7 else int(rng.integers(8, 13))
    if distinct:
        count = min(count, len(SHAPES))
    small = rng.random(count) < (0 if distinct else 0.16)
    largest = 66 if crowded or area < 0.7 else 84
    sides = np.where(small, rng.integers(22, 29, count), rng.integers(50 if distinct else 38, largest + 1, count))
    # Large ones first: they fit only while there is space.
    boxes = _boxes(rng, size, sorted((int(side) for side in sides), reverse=True))
    if distinct:
        shapes = list(rng.permutation(SHAPES)[: len(boxes)])
    else:
        shapes = list(rng.choice(SHAPES, len(boxes))) if crowded else _shapes(rng, len(boxes))
    order = rng.permutation(len(boxes))

    plan = layout(*size)
    canvas = Image.fromarray(_background(rng, size, photograph, tint))
    instances = Image.new("L", size, 0)
    objects = []
    for index, place in enumerate(order):
        box = boxes[place]
        width, height = box[2] - box[0], box[3] - box[1]
        colour = str(rng.choice(list(COLOURS)))
        shade = np.clip(np.asarray(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255)
        red, green, blue = (int(value) for value in shade)
        sprite = _sprite(shapes[index], (red, green, blue), (width, height), float(rng.uniform(-0.2, 0.2)))
        canvas.paste(sprite, box[:2], sprite)
        instances.paste(index + 1, box, sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 127)))
        code, plate = None, None
        if min(width, height) >= 50 and rng.random() < (0.95 if crowded or distinct else 0.6):
            plate = _plate_box(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), int(rng.integers(18, 21)))
            if plan.in_one_tile(plate):
                code = str(rng.choice(list(LETTERS))) + str(rng.choice(list(DIGITS)))
                _draw_plate(canvas, plate, code)
                instances.paste(index + 1, plate)
            else:
                plate = None
        objects.append(SceneObject(shapes[index], colour, box, code, plate, min(width, height) < 32))
    return Scene(np.asarray(canvas), np.asarray(instances), tuple(objects), size, tint, photograph)
