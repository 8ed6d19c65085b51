"""Pictures to send."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Coloured noise: uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    """The pixels as a PNG."""
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def png(height: int, width: int, seed: int = 0) -> bytes:
    """A PNG of coloured noise."""
    return encoded(noise(height, width, seed))
