"""Small models of every family: what holds for one must hold for all. A family joins with a line."""

from pathlib import Path
from typing import Protocol

from tests.vflowopt.models.tiny_internvl import INTERNVL
from tests.vflowopt.models.tiny_llava import LLAVA, LLAVA_NEXT
from tests.vflowopt.models.tiny_mistral3 import MISTRAL3
from tests.vflowopt.models.tiny_qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from tests.vflowopt.tiny_models import SHAPES


class TinyModel(Protocol):
    """A small model with random weights."""

    @property
    def name(self) -> str:
        """What tests call it."""

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Make it and save it as the folder that real ones come in; returns the folder."""


ONE_EACH: tuple[TinyModel, ...] = (
    SHAPES[0],
    LLAVA[0],
    LLAVA_NEXT[1],
    INTERNVL[0],
    MISTRAL3[0],
    QWEN2_VL[0],
    QWEN2_5_VL[0],
    QWEN3_VL[0],
)
"""One of every family, for what takes long."""

MODELS: tuple[TinyModel, ...] = (
    *SHAPES,
    *LLAVA,
    *LLAVA_NEXT,
    *INTERNVL,
    *MISTRAL3,
    *QWEN2_VL,
    *QWEN2_5_VL,
    *QWEN3_VL,
)
