"""The demo's figure: a picture, the importance of each token, the tokens that each stage keeps, and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

Box = tuple[float, float, float, float]

KEPT, RECYCLED = "#2f6fc4", "#e0592a"
_MOST_PIXELS = 800
_PANEL_INCHES = 3.0
_DROPPED = 0.16
"""Opacity of tokens that a stage has dropped."""


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


def draw(
    picture: Image.Image,
    maps: Sequence[TokenMap],
    stages: Sequence[str],
    *,
    title: str = "",
    answers: Sequence[tuple[str, str, str]] = (),
) -> Figure:
    """One row of panels per grid: the picture with its tokens, their importance, then what each stage keeps.

    Args:
        picture: the upright picture.
        maps: one per token grid.
        stages: names of the pruning stages, in order.
        title: above all.
        answers: below all, each a question, its answer from the compressed cache, and from the whole one.
    """
    pixels = picture.convert("RGB")
    pixels.thumbnail((_MOST_PIXELS, _MOST_PIXELS), Image.Resampling.LANCZOS)
    columns, shape = len(stages) + 2, picture.height / picture.width
    height = min(max(_PANEL_INCHES * shape, 0.8), 2 * _PANEL_INCHES) + 0.3
    below = 0.24 * (len(answers) + 1) if answers else 0.0
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(
            figsize=(_PANEL_INCHES * columns, height * len(maps) + below + 0.6), layout="constrained", dpi=90
        )
        panels, below_them = figure, None
        if answers:
            panels, below_them = figure.subfigures(2, 1, height_ratios=[height * len(maps) + 0.6, below])
        rows = panels.subplots(len(maps), columns, squeeze=False)
        for tokens, row in zip(maps, rows, strict=True):
            for axes in row:
                axes.set(xlim=(0, picture.width), ylim=(picture.height, 0), xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            shown, important, *kept = row
            shown.set_ylabel(tokens.name)
            _picture(shown, pixels, picture.size, tokens)
            _importance(important, pixels, picture.size, tokens)
            for stage, (axes, name) in enumerate(zip(kept, stages, strict=True)):
                _stage(axes, pixels, picture.size, tokens, stage)
                count = sum(last > stage for last in tokens.last_stage)
                axes.set_title(f"{name}: {count} of {len(tokens.boxes)} tokens", fontsize=10)
        rows[0][0].set_title("the picture", fontsize=10)
        rows[0][1].set_title("importance (yellow: high)", fontsize=10)
        if any(any(tokens.recycled) for tokens in maps):
            colours = {"kept as it is": KEPT, "average of dropped tokens": RECYCLED}
            keys = [Patch(edgecolor=colour, facecolor="none", label=name) for name, colour in colours.items()]
            panels.legend(handles=keys, loc="outside lower right", ncols=len(keys), frameon=False)
        panels.suptitle(title, fontsize=13)
        if below_them is not None:
            _answers(below_them.subplots(), answers)
    return figure


def _picture(axes: Axes, pixels: Image.Image, size: tuple[int, int], tokens: TokenMap) -> None:
    axes.imshow(pixels, extent=_extent(size))
    axes.add_collection(_boxes(tokens.boxes, facecolor="none", edgecolor=(1, 1, 1, 0.3), linewidth=0.5))


def _importance(axes: Axes, pixels: Image.Image, size: tuple[int, int], tokens: TokenMap) -> None:
    axes.imshow(pixels.convert("L"), extent=_extent(size), cmap="gray", vmin=0, vmax=255)
    # Ranks, not values: a few very important tokens would leave all others the same colour.
    heat = _boxes(tokens.boxes, cmap="viridis", alpha=0.75, linewidth=0)
    heat.set_array(np.argsort(np.argsort(tokens.importance)))
    axes.add_collection(heat)


def _stage(axes: Axes, pixels: Image.Image, size: tuple[int, int], tokens: TokenMap, stage: int) -> None:
    opacity = np.full(pixels.size[::-1], _DROPPED)
    across, down = pixels.width / size[0], pixels.height / size[1]
    staying = [number for number, last in enumerate(tokens.last_stage) if last > stage]
    for number in staying:
        left, top, right, bottom = tokens.boxes[number]
        opacity[round(top * down) : round(bottom * down), round(left * across) : round(right * across)] = 1.0
    axes.imshow(pixels, extent=_extent(size), alpha=opacity)
    edges = [RECYCLED if tokens.recycled[number] else KEPT for number in staying]
    axes.add_collection(
        _boxes([tokens.boxes[number] for number in staying], facecolor="none", edgecolor=edges, linewidth=0.9)
    )


def _answers(axes: Axes, answers: Sequence[tuple[str, str, str]]) -> None:
    axes.axis("off")
    lines = [("question", "answered from the compressed cache", "from the whole one"), *answers]
    for number, line in enumerate(lines):
        for place, text in zip((0.01, 0.42, 0.72), line, strict=True):
            axes.text(
                place,
                1 - (number + 0.5) / len(lines),
                shorten(text, 70, placeholder="…"),
                verticalalignment="center",
                color="black" if number else "#666666",
                transform=axes.transAxes,
            )


def _boxes(boxes: Sequence[Box], **looks: object) -> PatchCollection:
    return PatchCollection(
        [Rectangle((left, top), right - left, bottom - top) for left, top, right, bottom in boxes], **looks
    )


def _extent(size: tuple[int, int]) -> tuple[float, float, float, float]:
    width, height = size
    return 0, width, height, 0
