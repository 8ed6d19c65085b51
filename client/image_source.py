"""The forms in which a caller may hand over a picture, and how each becomes the contract's `Image`.

Knows no picture format: whether bytes are a picture is for the service to say.
"""

import io
import os
from pathlib import Path
from typing import Any, TypeAlias

from vflow.v1.images_pb2 import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image | Any"
"""A path, the bytes of a picture file, a `PIL.Image.Image`, or an `Image` of the contract (`Image(digest=...)` for a
picture that the service still holds). `Any` stands for the PIL class, which this package does not import."""


def to_image(source: ImageSource) -> Image:
    """Reads `source` into an `Image` message. A PIL image is sent as PNG, so that no pixel changes.

    Raises:
        OSError: a path that cannot be read.
        TypeError: something that is none of the forms of `ImageSource`.
    """
    match source:
        case Image():
            return source
        case str() | os.PathLike():
            return Image(data=Path(source).read_bytes())
        case bytes() | bytearray() | memoryview():
            return Image(data=bytes(source))
    if _is_pil_image(source):
        return Image(data=_to_png(source))
    raise TypeError(f"expected a path, bytes, a PIL image or vflow_client.Image, got {type(source).__name__}")


def _is_pil_image(source: object) -> bool:
    """Whether `source` is a PIL image, without importing PIL: a caller who has one has imported it already."""
    return any(cls.__module__ == "PIL.Image" and cls.__name__ == "Image" for cls in type(source).__mro__)


def _to_png(picture: Any) -> bytes:
    """Encodes a PIL image upright (Pillow's PNG would lose its orientation), without loss where PNG can hold it."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(picture)
    if upright.mode not in {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}:
        upright = upright.convert("RGB")
    buffer = io.BytesIO()
    # Level 1: the bytes are sent only once, and the default level takes seconds on a photograph.
    upright.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
