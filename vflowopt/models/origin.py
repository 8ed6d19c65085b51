"""Where a loaded model came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelOrigin:
    """Where a loaded model came from.

    Attributes:
        folder: the folder with its files.
        quantization: how its weights were quantized while they were read; None: they were not.
    """

    folder: Path
    quantization: str | None
