"""Draws on a picture how important each visual token is, and which tokens are kept."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import Picture

LONGEST_SIDE = 720
"""Pixels of the drawing's longer side."""

HEAT = (255, 176, 0)
KEPT = (90, 160, 255)
RECYCLED = (255, 110, 60)


def overlay(picture: Picture, image: CompressedImage, grid: int) -> bytes:
    """Draw one token grid of a compressed picture.

    Warmer tokens are more important. Frames mark the tokens of the first stage: blue ones are kept as they are, orange
    ones are averages of dropped tokens.

    Args:
        picture: the picture.
        image: its compressed form.
        grid: index of the grid; nothing is drawn if there is no such grid.

    Returns:
        A PNG file.
    """
    layout = image.layout
    content = ((layout.grid == grid) & ~layout.structural).numpy()
    height, width = picture.pixels.shape[:2]
    scale = min(LONGEST_SIDE / max(width, height), 1.0)
    base = Image.fromarray(picture.pixels).resize((max(round(width * scale), 1), max(round(height * scale), 1)))
    boxes = np.rint(layout.boxes.numpy() * scale).astype(int)
    importance = image.importance.numpy()
    # The importance of a few tokens is far above all others: on a linear scale only those would be visible.
    warmth = np.zeros(len(importance))
    if content.any():
        most = np.quantile(importance[content], 0.98) or 1.0
        warmth = np.sqrt(np.clip(importance / most, 0.0, 1.0))
    mask = Image.new("L", base.size)
    painted = ImageDraw.Draw(mask)
    for token in np.flatnonzero(content):
        left, top, right, bottom = boxes[token].tolist()
        painted.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=int(200 * warmth[token]))
    drawn = Image.blend(base, base.convert("L").convert("RGB"), 0.6)
    drawn.paste(Image.new("RGB", base.size, HEAT), mask=mask)
    frames = ImageDraw.Draw(drawn)
    recycled = set(image.recycled.tolist())
    for token in image.kept[0].tolist():
        if content[token]:
            left, top, right, bottom = boxes[token].tolist()
            frame = (left, top, max(right - 1, left), max(bottom - 1, top))
            frames.rectangle(frame, outline=RECYCLED if token in recycled else KEPT)
    file = BytesIO()
    drawn.save(file, "PNG")
    return file.getvalue()
