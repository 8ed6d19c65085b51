"""The forms in which a caller can pass a picture, and their conversion to the contract's `Image`.

This module knows no picture formats: the service decides whether bytes are a picture.
"""

import os
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from vflow_client.picture_path import read_picture
from vflow_client.pil_image import to_file
from vflow_client.v1.images_pb2 import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image | Any"
"""A path, the bytes of a picture file, a `PIL.Image.Image`, or an `Image` of the contract (`Image(digest=...)` for a
picture that the service has stored). `Any` stands for the PIL class, which this package does not import."""

ImageSources: TypeAlias = "ImageSource | Iterable[ImageSource]"
"""One picture, or several."""

Detail: TypeAlias = Literal["auto", "low", "high"]
"""How closely the model looks at a picture: "low": an overview; "high": every detail; "auto": the service's choice."""

_DETAILS = {"low": Image.LOW, "high": Image.HIGH}


def to_image(source: ImageSource, detail: Detail = "auto") -> Image:
    """Reads `source` into an `Image` message. A PIL image is sent as its file, or encoded without loss.

    Args:
        source: the picture.
        detail: how closely to look at it; "auto" leaves the choice to the service, or to the detail of an `Image`.

    Raises:
        OSError: a path that cannot be read.
        TypeError: `source` is no `ImageSource`.
        ValueError: `detail` is unknown, or `source` is a web address, which is not fetched.
    """
    if detail == "auto":
        return _read(source)
    if detail not in _DETAILS:
        raise ValueError(f"detail is {detail!r}; give 'auto', 'low' or 'high'")
    image = Image()
    image.CopyFrom(_read(source))  # the caller's own message is not changed
    image.detail = _DETAILS[detail]
    return image


def _read(source: ImageSource) -> Image:
    match source:
        case Image():
            return source
        case str() | os.PathLike():
            return Image(data=read_picture(source))
        case bytes() | bytearray() | memoryview():
            return Image(data=bytes(source))
    if _is_pil_image(source):
        return Image(data=to_file(source))
    raise TypeError(f"expected a path, bytes, a PIL image or vflow_client.Image, got {type(source).__name__}")


def is_one_image(source: object) -> bool:
    """Whether `source` is an `ImageSource`, and not several."""
    return isinstance(source, str | os.PathLike | bytes | bytearray | memoryview | Image) or _is_pil_image(source)


def _is_pil_image(source: object) -> bool:
    """Whether `source` is a PIL image, without importing PIL: a caller who has one has imported it."""
    return any(cls.__module__ == "PIL.Image" and cls.__name__ == "Image" for cls in type(source).__mro__)
