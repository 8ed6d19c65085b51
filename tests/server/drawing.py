"""Pictures to send."""

from io import BytesIO

import numpy as np
from PIL import Image


def png(height: int, width: int, seed: int = 0) -> bytes:
    """A PNG of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
