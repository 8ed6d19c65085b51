"""The range of pixels to which a model's video processor resizes frames.

Hugging Face's video processors need torchvision, so their configuration is read without them, from the files that they
would read it from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file


def video_size(model: str | Path, default: tuple[int, int]) -> tuple[int, int]:
    """Fewest and most pixels; ``default`` if the model's files do not name them."""
    settings = _settings(model)
    size = settings.get("size") or {}
    return (
        settings.get("min_pixels") or size.get("shortest_edge") or default[0],
        settings.get("max_pixels") or size.get("longest_edge") or default[1],
    )


def _settings(model: str | Path) -> dict[str, Any]:
    """The video processor's own, else those of the image processor, as Hugging Face has it."""
    together = _read(model, PROCESSOR_NAME).get("video_processor")
    return together or _read(model, VIDEO_PROCESSOR_NAME) or _read(model, IMAGE_PROCESSOR_NAME)


def _read(model: str | Path, file: str) -> dict[str, Any]:
    found = cached_file(
        str(model),
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    document: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
    return document
