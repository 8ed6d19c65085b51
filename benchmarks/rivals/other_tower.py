"""VFlowOpt on what the same model's vision tower makes of a picture in another number type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.rivals.method import Compressed, Method, Sight
from benchmarks.rivals.vflowopt import VFlowOpt
from vflowopt.media.picture import Picture
from vflowopt.models.loading import load_model
from vflowopt.runtime.model_runner import Runtime


class OtherTower(Method):
    """VFlowOpt with a vision tower of its own.

    Args:
        base: whose strategies it uses.
        model: folder or hub id of the model, which is loaded once more.
        device: where to load it.
        dtype: type of its decoder, by name.
        tower_dtype: type of its vision tower.

    Raises:
        ModelError: the model cannot be loaded, or has no tower that can be converted.
    """

    def __init__(self, base: VFlowOpt, model: str | Path, *, device: str, dtype: str, tower_dtype: torch.dtype) -> None:
        self.name = f"{base.name}-{str(tower_dtype).removeprefix('torch.')}-tower"
        self._base = base
        self._model = load_model(model, device=device, dtype=dtype)
        self._model.set_tower_dtype(tower_dtype)
        self._model.fuse()

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        assert isinstance(sight.picture, Picture)
        encoded = self._model.encode([sight.picture])[0]
        return self._base.compress(runtime, Sight(sight.picture, encoded, sight.question), retentions)
