"""AnyRes geometry of the embedded model: how a picture becomes 224 px tiles and the tiles become a row of tokens.

States what the family's image processor and ``pack_image_features`` do, in picture coordinates, so that the generator
can place things inside a tile, labels can follow the pixels, and training can pack cached features. It uses neither
torch nor a model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
from PIL import Image

TILE = 224
PATCH = 14
SIDE = TILE // PATCH
"""Patches along one side of a tile."""

GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (1, 4), (4, 1))
"""Tile grids (rows, columns) that a picture may be cut into."""


@dataclass(frozen=True)
class AnyResLayout:
    """Where the pixels of one picture go.

    Attributes:
        width, height: size of the picture in pixels.
        rows, columns: the tile grid that suits it best.
        content_width, content_height: size that the picture is resized to inside the grid, in pixels.
        left, top: padding before the content, in pixels.
        token_rows, token_columns: half-open ranges of the mosaic's token grid that remain after unpadding.
    """

    width: int
    height: int
    rows: int
    columns: int
    content_width: int
    content_height: int
    left: int
    top: int
    token_rows: tuple[int, int]
    token_columns: tuple[int, int]

    @property
    def tiles(self) -> int:
        """Number of mosaic tiles, without the overview."""
        return self.rows * self.columns

    @property
    def token_count(self) -> int:
        """Visual tokens of the picture: overview, mosaic, and one newline per mosaic row."""
        rows = self.token_rows[1] - self.token_rows[0]
        columns = self.token_columns[1] - self.token_columns[0]
        return SIDE * SIDE + rows * (columns + 1)

    def in_one_tile(self, box: tuple[float, float, float, float]) -> bool:
        """Whether a box (left, top, right, bottom in picture pixels) lies wholly inside one mosaic tile."""
        scale_x, scale_y = self.content_width / self.width, self.content_height / self.height
        left, right = (self.left + x * scale_x for x in (box[0], box[2]))
        top, bottom = (self.top + y * scale_y for y in (box[1], box[3]))
        return left // TILE == (right - 1e-6) // TILE and top // TILE == (bottom - 1e-6) // TILE


@lru_cache(maxsize=4096)
def layout(width: int, height: int) -> AnyResLayout:
    """The AnyRes layout of a picture of ``width`` x ``height`` pixels: the grid that keeps most of its resolution."""
    best, best_key = GRIDS[0], (-1, 0)
    for rows, columns in GRIDS:
        scale = min(columns * TILE / width, rows * TILE / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        key = (effective, effective - rows * columns * TILE * TILE)
        if key > best_key:
            best, best_key = (rows, columns), key
    rows, columns = best
    full_width, full_height = columns * TILE, rows * TILE
    if full_width / width < full_height / height:
        content_width, content_height = full_width, min(ceil(height * (full_width / width)), full_height)
    else:
        content_width, content_height = min(ceil(width * (full_height / height)), full_width), full_height

    # Unpadding works on the token grid, with its own rounding.
    token_width, token_height = columns * SIDE, rows * SIDE
    token_rows, token_columns = (0, token_height), (0, token_width)
    if width / height > token_width / token_height:
        margin = (token_height - int(round(height * (token_width / width), 7))) // 2
        token_rows = (margin, token_height - margin)
    else:
        margin = (token_width - int(round(width * (token_height / height), 7))) // 2
        token_columns = (margin, token_width - margin)
    return AnyResLayout(
        width=width,
        height=height,
        rows=rows,
        columns=columns,
        content_width=content_width,
        content_height=content_height,
        left=(full_width - content_width) // 2,
        top=(full_height - content_height) // 2,
        token_rows=token_rows,
        token_columns=token_columns,
    )


def _cut(mosaic: np.ndarray, plan: AnyResLayout) -> Iterator[np.ndarray]:
    for row in range(plan.rows):
        for column in range(plan.columns):
            yield mosaic[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]


def tiles(picture: np.ndarray, *, labels: bool = False) -> np.ndarray:
    """Cut a picture into its overview and mosaic tiles.

    Args:
        picture: uint8, (height, width, 3) pixels; with ``labels`` a (height, width) map of ids.
        labels: resize without interpolating between neighbours, as ids demand.

    Returns:
        uint8 of shape (1 + tiles, 224, 224, 3), or (1 + tiles, 224, 224) for a map; the overview comes first.
    """
    height, width = picture.shape[:2]
    plan = layout(width, height)
    resample = Image.Resampling.NEAREST if labels else Image.Resampling.BICUBIC
    image = Image.fromarray(picture)
    overview = np.asarray(image.resize((TILE, TILE), resample))
    mosaic = np.zeros((plan.rows * TILE, plan.columns * TILE, *picture.shape[2:]), np.uint8)
    content = np.asarray(image.resize((plan.content_width, plan.content_height), resample))
    mosaic[plan.top : plan.top + plan.content_height, plan.left : plan.left + plan.content_width] = content
    return np.stack([overview, *_cut(mosaic, plan)])


@lru_cache(maxsize=4096)
def token_sources(width: int, height: int) -> np.ndarray:
    """Which tower output each visual token of a picture is, in the order in which the language model reads them.

    Returns:
        int64 of shape (tokens,): ``tile * 256 + patch`` (tile 0 is the overview), or -1 for a newline token.
    """
    plan = layout(width, height)
    rows = np.arange(*plan.token_rows)[:, None]
    columns = np.arange(*plan.token_columns)[None, :]
    tile = 1 + (rows // SIDE) * plan.columns + columns // SIDE
    source = tile * SIDE * SIDE + (rows % SIDE) * SIDE + columns % SIDE
    mosaic = np.pad(source, ((0, 0), (0, 1)), constant_values=-1).reshape(-1)
    return np.concatenate([np.arange(SIDE * SIDE), mosaic])
