"""Families that cut a picture into square tiles, encode each by itself, and project the features: LLaVA and others.

A subclass says how a picture is cut and how the tiles' tokens are packed. Modules, geometry and packing are Hugging
Face's own. Importance is packed by the same functions as the features, so the two always match.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.image_utils import ChannelDimension

from vflowopt.compression.layout import TokenLayout
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.media.picture import Detail, Picture
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.normalisation import Normalisation
from vflowopt.models.resizing import in_pieces
from vflowopt.models.tower import ClipTower, Tower

SCORINGS = ("mean", "cls")
"""Whose attention scores the tokens: that of all patches, as in the paper, or that of the class token."""


_MOST_TILES = 8
"""Tiles that the tower encodes in one piece: more take no less time each, and let other work wait."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What the tower and the projector make of tiles.

    Attributes:
        tokens: [tiles, tokens, hidden].
        query: [tiles, heads, patches, head_dim], of the scoring layer, or of its class token alone.
        key: [tiles, heads, patches, head_dim].
        class_key: [tiles, heads, 1, head_dim]; None: there is no class token.
    """

    tokens: Tensor
    query: Tensor
    key: Tensor
    class_key: Tensor | None


class TiledModel(MultimodalModel):
    """A model that encodes a picture tile by tile.

    The configuration may name, under ``vflow_scoring_layer``, another layer to score tokens by than the last one whose
    output feeds the projector, and under ``vflow_scoring`` one of :data:`SCORINGS`.

    Args:
        network: see :class:`MultimodalModel`.
        tokenizer: see there.
        processor: see there.

    Attributes:
        tower: the vision tower.
        merge: side, in patches, of the square that becomes one token.

    Raises:
        ModelError: the configuration uses something that is not supported, by name.
    """

    towers: ClassVar[dict[str, type[Tower]]] = {"clip_vision_model": ClipTower, "siglip_vision_model": Tower}
    """Supported towers, by the ``model_type`` of their configuration."""

    merge = 1

    def __init__(self, network: Any, tokenizer: Any, processor: Any) -> None:
        super().__init__(network, tokenizer, processor)
        config = network.config
        kind = config.vision_config.model_type
        if kind not in self.towers:
            raise self.unsupported(f"a vision tower {kind!r} (supported: {', '.join(self.towers)})")
        self.tower = self.towers[kind](
            network.model.vision_tower, config.vision_feature_layer, getattr(config, "vflow_scoring_layer", None)
        )
        self.scoring_layer = self.tower.scoring
        # What it selects must be the patches, all of them and nothing else.
        selected = "default" if self.tower.class_token else "full"
        if config.vision_feature_select_strategy != selected:
            raise self.unsupported(f"vision_feature_select_strategy other than {selected!r} with a tower {kind!r}")
        self._scoring = getattr(config, "vflow_scoring", "mean")
        if self._scoring not in SCORINGS:
            raise self.unsupported(f"vflow_scoring {self._scoring!r} (supported: {', '.join(SCORINGS)})")
        if self._scoring == "cls" and not self.tower.class_token:
            raise self.unsupported(f"vflow_scoring 'cls' with a tower {kind!r} without class token")

    def _encoding(self, pictures: Sequence[Picture]) -> Pieces[list[EncodedImage]]:
        tiles = []
        for picture in pictures:
            tiles.append((yield from in_pieces(self.processor, partial(self.tiles, picture))))
            yield
        every = np.concatenate(tiles)
        groups = (every[first : first + _MOST_TILES] for first in range(0, len(every), _MOST_TILES))
        seen = yield from self._looking(groups, self._project)
        counts = [len(of_picture) for of_picture in tiles]
        sizes = [picture.pixels.shape[:2] for picture in pictures]
        packed = [self._pack(tokens, size) for tokens, size in zip(seen.tokens.split(counts), sizes, strict=True)]
        return [
            EncodedImage(
                digest=picture.digest,
                embeddings=embeddings,
                layout=self.layout(picture.height, picture.width, picture.detail),
                query=query,
                key=key,
                scale=self.tower.scale,
                pixels=channels_last(cut),
                patch=self.patch,
                arrange=partial(self._arrange, size),
                class_key=class_key,
                merge=self.merge,
                detail=picture.detail,
            )
            for picture, size, embeddings, query, key, class_key, cut in zip(
                pictures,
                sizes,
                packed,
                seen.query.split(counts),
                seen.key.split(counts),
                [None] * len(counts) if seen.class_key is None else seen.class_key.split(counts),
                tiles,
                strict=True,
            )
        ]

    def _looking(self, groups: Iterable[np.ndarray], project: Callable[[Tensor], Tensor]) -> Pieces[Seen]:
        """Let the tower see groups of 8-bit tiles, one group in a piece; all that it saw.

        Args:
            groups: uint8 [tiles, 3, side, side] each.
            project: from features [tiles, patches, channels] to tokens [tiles, tokens, hidden].
        """
        seen = []
        for tiles in groups:
            seen.append(self._look(tiles, project))
            yield
        class_keys = [each.class_key for each in seen if each.class_key is not None]
        return Seen(
            torch.cat([each.tokens for each in seen]),
            torch.cat([each.query for each in seen]),
            torch.cat([each.key for each in seen]),
            torch.cat(class_keys) if class_keys else None,
        )

    def _look(self, tiles: np.ndarray, project: Callable[[Tensor], Tensor]) -> Seen:
        # A fused tower takes bytes: normalising them is part of its first product.
        pixels = self.normalised(tiles) if self.tower.patches is None else torch.from_numpy(tiles)
        features, query, key = self.tower(pixels)
        if not self.tower.class_token:
            return Seen(project(features).to(self.dtype), query, key, None)
        query = query[:, :, :1] if self._scoring == "cls" else query[:, :, 1:]
        return Seen(project(features[:, 1:]).to(self.dtype), query, key[:, :, 1:], key[:, :, :1])

    @property
    def tower_dtype(self) -> torch.dtype:
        """See :attr:`MultimodalModel.tower_dtype`."""
        weights = (weight for part in self.tower_parts for weight in part.parameters())
        first = next(weights, None)
        return super().tower_dtype if first is None else first.dtype

    def set_tower_dtype(self, dtype: torch.dtype) -> None:
        """See :meth:`MultimodalModel.set_tower_dtype`."""
        super().set_tower_dtype(dtype)
        if self.tower.patches is not None:
            self._fuse_tower()

    @property
    def tower_parts(self) -> tuple[nn.Module, ...]:
        """See :attr:`MultimodalModel.tower_parts`."""
        if self.quantized or self.shared:
            return ()
        return self.network.model.vision_tower, self.network.model.multi_modal_projector

    def fuse(self) -> None:
        """See :meth:`MultimodalModel.fuse`."""
        super().fuse()
        self._fuse_tower()

    def _fuse_tower(self) -> None:
        self.tower.fuse(self.processor.rescale_factor, self.processor.image_mean, self.processor.image_std)

    def tiles(self, picture: Picture) -> np.ndarray:
        """The 8-bit tiles that the tower sees: uint8 [tiles, 3, side, side].

        Raises:
            PictureError: the processor cannot cut a picture of this shape.
        """
        try:
            return self._cut(picture.pixels, picture.detail)
        except (ValueError, ZeroDivisionError) as error:
            raise self.too_narrow(picture) from error

    def normalised(self, tiles: np.ndarray) -> Tensor:
        """What the tower reads of 8-bit tiles: float32 [tiles, 3, side, side], on the model's device."""
        return self._normalise(tiles)

    @cached_property
    def _normalise(self) -> Normalisation:
        return Normalisation(self.processor, self.device)

    @property
    def encoder_layers(self) -> Sequence[nn.Module]:
        """See :attr:`MultimodalModel.encoder_layers`."""
        return self.tower.layers

    @property
    def side(self) -> int:
        """Side of a tile in pixels."""
        side: int = self.network.config.vision_config.image_size
        return side

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        patch: int = self.network.config.vision_config.patch_size
        return patch

    @abstractmethod
    def layout(self, height: int, width: int, detail: Detail) -> TokenLayout:
        """Where the visual tokens of a picture of ``height`` x ``width`` pixels come from."""

    def _cut(self, pixels: np.ndarray, detail: Detail, **options: Any) -> np.ndarray:
        """The processor's tiles before rescaling, of pixels uint8 [height, width, 3]: [tiles, 3, side, side].

        A family whose pictures are a single tile anyway cuts both details alike.
        """
        batch = self.processor(
            pixels, do_rescale=False, do_normalize=False, input_data_format=ChannelDimension.LAST, **options
        )
        return np.asarray(batch["pixel_values"])

    def _project(self, features: Tensor) -> Tensor:
        """The tower's features of patches [tiles, patches, channels] to tokens [tiles, tokens, hidden]."""
        projected: Tensor = self.network.model.multi_modal_projector(features)
        return projected

    @abstractmethod
    def _pack(self, projected: Tensor, size: Sequence[int]) -> Tensor:
        """One picture's tokens [tiles, tokens, hidden], in the order in which the decoder reads them: [N, hidden]."""

    @abstractmethod
    def _arrange(self, size: Sequence[int], values: Tensor) -> Tensor:
        """One picture's values per patch, [tiles, patches], through the same: [N]."""


def channels_last(tiles: np.ndarray) -> Tensor:
    """[tiles, 3, height, width] to uint8 [tiles, height, width, 3]."""
    return torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 2, 3, 1)))
