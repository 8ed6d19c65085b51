"""The number type of the vision tower, where the service chooses it."""

from __future__ import annotations

import time
from dataclasses import asdict

import structlog
import torch
from torch import nn

from vflowopt.demo import picture_path
from vflowopt.media.picture import Picture
from vflowopt.models.product import bfloat16_is_faster
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.tower_agreement import compare_towers

_PICTURES = ("cat.png", "gravel.png", "photographer.png")
_QUESTION = "What is in the picture?"

_MOST_SECONDS = 3.0
"""Of the start, for the comparison. With the embedded model it takes 0.2 seconds."""

log = structlog.get_logger(__name__)


def choose_tower_dtype(runtime: Runtime) -> None:
    """Run the vision tower in bfloat16 if the processor multiplies it faster, and its results agree with float32's.

    Only a model in float32 on the processor is converted. The two are compared on the bundled pictures.
    """
    model = runtime.model
    if model.device.type != "cpu" or model.tower_dtype != torch.float32:
        return
    maps = [each for part in model.tower_parts for each in part.modules() if isinstance(each, nn.Linear)]
    if not maps:
        log.info("the vision tower stays in float32: in this model it is of the decoder's type")
        return
    largest = max((each.weight for each in maps), key=torch.Tensor.numel)
    if not bfloat16_is_faster(*largest.shape):
        log.info("the vision tower stays in float32: the processor multiplies bfloat16 no faster")
        return
    begun = time.perf_counter()
    pictures = [Picture.decode((picture_path() / name).read_bytes()) for name in _PICTURES]
    try:
        agreement = compare_towers(runtime, torch.bfloat16, pictures, _QUESTION, most_seconds=_MOST_SECONDS)
    except PoolExhausted:
        log.info("the vision tower stays in float32: the KV budget is too small to compare it with one in bfloat16")
    else:
        if agreement is None:
            log.info(
                "the vision tower stays in float32: it takes too long to compare; --tower-dtype can choose another"
            )
            return
        log.info(
            "the vision tower was compared in bfloat16 and float32",
            tower_dtype=str(model.tower_dtype).removeprefix("torch."),
            **{name: round(value, 4) for name, value in asdict(agreement).items()},
            milliseconds=round((time.perf_counter() - begun) * 1e3),
        )
