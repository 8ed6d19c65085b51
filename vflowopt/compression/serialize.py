"""Packing: a compressed picture as the bytes of a safetensors file, and back, exactly. Never pickle.

Equal pictures have equal bytes: timings are left out, so that a file can be named by its content.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.pipeline import CompressedImage, CompressionTimings

_KIND = "vflow.CompressedImage"
"""The key of the file's metadata under which the scalar fields are, as JSON."""

_LAYOUT, _KEPT = "layout.", "kept."


class PackingError(ValueError):
    """The bytes are no compressed picture."""


def pack(image: CompressedImage) -> bytes:
    """The bytes of a file that holds ``image``, without its timings."""
    tensors = {f"{_LAYOUT}{field.name}": getattr(image.layout, field.name) for field in fields(TokenLayout)}
    tensors |= {f"{_KEPT}{stage}": kept for stage, kept in enumerate(image.kept)}
    scalars: dict[str, Any] = {}
    for field in fields(CompressedImage):
        value = getattr(image, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif isinstance(value, str | int | float):
            scalars[field.name] = value
    # Clones, since safetensors takes neither two tensors of one memory nor strides.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # One entry of metadata alone: safetensors writes several in any order.
    return save(whole, {_KIND: json.dumps(scalars, sort_keys=True)})


def unpack(data: bytes) -> CompressedImage:
    """The picture that :func:`pack` made ``data`` of, on the host, with timings of zero.

    Raises:
        PackingError: the bytes are no packed picture, or are damaged.
    """
    try:
        tensors: dict[str, Any] = load(data)
        layout = {field.name: tensors.pop(f"{_LAYOUT}{field.name}") for field in fields(TokenLayout)}
        stages = sum(name.startswith(_KEPT) for name in tensors)
        return CompressedImage(
            layout=TokenLayout(**layout),
            kept=tuple(tensors.pop(f"{_KEPT}{stage}") for stage in range(stages)),
            timings=CompressionTimings(0.0, 0.0, 0.0),
            **tensors,
            **_scalars(data),
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PackingError(f"this is not a compressed picture ({error})") from error


def _scalars(data: bytes) -> dict[str, Any]:
    """The scalar fields, from the header: eight bytes say how long it is, then it comes as JSON."""
    length = int.from_bytes(data[:8], "little")
    scalars: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KIND])
    return scalars
