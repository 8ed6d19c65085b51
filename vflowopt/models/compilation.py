"""Compiling a vision encoder, and keeping what was compiled for the next start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vflowopt.media.picture import Picture
from vflowopt.models.interface import MultimodalModel

Backend = Callable[..., Callable[..., object]]
"""A compiler, as ``torch.compile`` calls it."""

_WARM_UP_SIDE = 448


def compile_encoder(model: MultimodalModel, cache: Path, *, backend: str | Backend = "inductor") -> None:
    """Compile the layers of a model's vision encoder with ``torch.compile``.

    One program serves all layers of a kind and any number of patches. It is made here, with pictures of no content, and
    not while the first callers wait. Compiled layers round otherwise than those that are not, so answers may differ
    where two tokens are about equally likely.

    Args:
        model: the model; nothing may use it meanwhile.
        cache: folder of compiled programs. What it holds is not compiled again, so the next start takes less time.
        backend: the compiler, or the name that ``torch.compile`` knows it by.

    Raises:
        RuntimeError: the layers cannot be compiled, for example because there is no compiler. They are as before then.
    """
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)  # Triton's own cache goes below it
    for layer in model.encoder_layers:
        layer.compile(backend=backend, dynamic=True)
    picture = Picture.from_pixels(np.zeros((_WARM_UP_SIDE, _WARM_UP_SIDE, 3), np.uint8))
    try:
        for detail in ("low", "high"):  # one tile, and several: torch makes a program of its own for a batch of one
            model.encode([picture.in_detail(detail)])
    except Exception as failure:
        for layer in model.encoder_layers:
            layer._compiled_call_impl = None
        torch.compiler.reset()
        reason = str(failure).strip().partition("\n")[0]
        raise RuntimeError(f"the vision encoder cannot be compiled: {reason}") from failure
