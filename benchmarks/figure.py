"""The demo's figure: a picture, its importance map, and what each stage keeps, for each token grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Most pixels of a panel.
_WIDTH, _HEIGHT = 300, 600
_GAP = 14
_CAPTION = 22
_PAPER = (250, 250, 248)
_INK = (40, 40, 44)
# Dark blue over green to yellow: light is important.
_RAMP = np.array([(36, 30, 84), (44, 90, 132), (38, 140, 134), (96, 196, 96), (248, 228, 60)], dtype=np.float32)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class TokenMap:
    """The tokens with pixels of one grid: their boxes in the picture, importance, and the stages that keep them.

    ``last_stage`` counts the stages a token survives: 0 if it is dropped at once.
    """

    name: str
    boxes: Sequence[Box]
    importance: Sequence[float]
    last_stage: Sequence[int]
    recycled: Sequence[bool]


def draw(picture: Image.Image, maps: Sequence[TokenMap], stages: int) -> Image.Image:
    """One row of panels per grid: importance, then what each stage keeps; the picture itself before the first row.

    Args:
        picture: the upright picture.
        maps: one per token grid.
        stages: pruning stages.
    """
    scale = min(_WIDTH / picture.width, _HEIGHT / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    columns, rows = stages + 2, len(maps)
    sheet = Image.new(
        "RGB",
        (columns * (_WIDTH + _GAP) + _GAP, rows * (small.height + _CAPTION + _GAP) + _GAP),
        _PAPER,
    )
    for row, tokens in enumerate(maps):
        panels = [(f"{tokens.name}: {len(tokens.boxes)} tokens", _grid(small, tokens, scale))]
        panels.append(("importance", _heat(small, tokens, scale)))
        for stage in range(stages):
            kept = sum(last > stage for last in tokens.last_stage)
            panels.append((f"stage {stage + 1}: {kept} kept", _kept(small, tokens, scale, stage)))
        for column, (caption, panel) in enumerate(panels):
            corner = (_GAP + column * (_WIDTH + _GAP), _GAP + row * (small.height + _CAPTION + _GAP))
            ImageDraw.Draw(sheet).text(corner, caption, fill=_INK, font=ImageFont.load_default(14))
            sheet.paste(panel, (corner[0], corner[1] + _CAPTION))
    return sheet


def _grid(small: Image.Image, tokens: TokenMap, scale: float) -> Image.Image:
    panel = small.copy()
    pen = ImageDraw.Draw(panel, "RGBA")
    for box in tokens.boxes:
        pen.rectangle(_scaled(box, scale), outline=(255, 255, 255, 70))
    return panel


def _heat(small: Image.Image, tokens: TokenMap, scale: float) -> Image.Image:
    panel = small.convert("L").convert("RGB")
    pen = ImageDraw.Draw(panel, "RGBA")
    # Ranks, not values: a few very important tokens would leave all others the same colour.
    ranks = np.argsort(np.argsort(tokens.importance)) / max(len(tokens.importance) - 1, 1)
    places = ranks * (len(_RAMP) - 1)
    lower = places.astype(int).clip(max=len(_RAMP) - 2)
    colours = _RAMP[lower] + (places - lower)[:, None] * (_RAMP[lower + 1] - _RAMP[lower])
    for box, colour in zip(tokens.boxes, colours.astype(int), strict=True):
        pen.rectangle(_scaled(box, scale), fill=(*(int(channel) for channel in colour), 190))
    return panel


def _kept(small: Image.Image, tokens: TokenMap, scale: float, stage: int) -> Image.Image:
    panel = Image.blend(small, Image.new("RGB", small.size, (255, 255, 255)), 0.82)
    pen = ImageDraw.Draw(panel)
    for box, last, recycled in zip(tokens.boxes, tokens.last_stage, tokens.recycled, strict=True):
        if last <= stage:
            continue
        left, top, right, bottom = corners = _scaled(box, scale)
        if right > left and bottom > top:
            panel.paste(small.crop(corners), corners)
        pen.rectangle(corners, outline=(214, 84, 34) if recycled else (60, 120, 200))
    return panel


def _scaled(box: Box, scale: float) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(side * scale) for side in box)
    return left, top, max(right - 1, left), max(bottom - 1, top)
