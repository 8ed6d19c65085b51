"""Mistral Small 3.1: Pixtral's tower, pictures of any size, patches merged by squares, a token behind each row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Mistral3ForConditionalGeneration
from transformers.image_utils import SizeDict
from transformers.models.pixtral.modeling_pixtral import apply_rotary_pos_emb

from vflowopt.compression.layout import TokenLayout, boxes_of
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.media.picture import Picture
from vflowopt.models.interface import LOW_DETAIL_TOKENS, MultimodalModel
from vflowopt.models.normalisation import Normalisation
from vflowopt.models.resizing import in_pieces
from vflowopt.models.tower import Tower, split_heads


class PixtralTower(Tower):
    """A Pixtral tower: turns queries and keys by row and column of their patches; looks at one picture at a time."""

    @property
    def layers(self) -> Sequence[Any]:
        """See :attr:`Tower.layers`."""
        layers: Sequence[Any] = self.module.transformer.layers
        return layers

    @property
    def scale(self) -> float:
        """See :attr:`Tower.scale`."""
        scale: float = self.layers[self.scoring].attention.scaling
        return scale

    def _embed(self, pixels: Tensor) -> Tensor:
        patches = self.module.patch_conv(pixels)
        hidden: Tensor = self.module.ln_pre(patches.flatten(2).transpose(1, 2))
        places = torch.cartesian_prod(*(torch.arange(side, device=pixels.device) for side in patches.shape[2:]))
        self._turns = self.module.patch_positional_embedding(hidden, places)  # for the layers of this call
        return hidden

    def _run(self, layer: Any, hidden: Tensor) -> Tensor:
        # Of one picture every patch sees every other: Hugging Face's mask, of all pictures of a batch, says no more.
        output: Tensor = layer(hidden, None, position_embeddings=self._turns)
        return output

    def _queries_and_keys(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        attention, normed = layer.attention, layer.attention_norm(hidden)
        query, key = (split_heads(map_(normed), attention.num_heads) for map_ in (attention.q_proj, attention.k_proj))
        turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(query, key, *self._turns, unsqueeze_dim=0)
        return turned


class Mistral3(MultimodalModel):
    """A model of the family ``mistral3``.

    A picture is resized to whole squares of patches, not cut or padded. The tokens ``[IMG_BREAK]`` and ``[IMG_END]``
    that end its rows are structural. The configuration may name, under ``vflow_scoring_layer``, another layer to score
    tokens by than the last one whose output feeds the projector.

    Args:
        network: see :class:`MultimodalModel`.
        tokenizer: see there.
        processor: see there.

    Attributes:
        tower: the vision tower.
        merge: side, in patches, of the square that becomes one token.
        patch: side of a patch in pixels.

    Raises:
        ModelError: the configuration uses something that is not supported, by name.
    """

    family = "Mistral 3"
    architecture = Mistral3ForConditionalGeneration

    def __init__(self, network: Any, tokenizer: Any, processor: Any) -> None:
        super().__init__(network, tokenizer, processor)
        config = network.config
        if config.vision_config.model_type != "pixtral":
            raise self.unsupported(f"a vision tower {config.vision_config.model_type!r} (supported: pixtral)")
        self.tower = PixtralTower(
            network.model.vision_tower, config.vision_feature_layer, getattr(config, "vflow_scoring_layer", None)
        )
        self.scoring_layer = self.tower.scoring
        self.merge: int = config.spatial_merge_size
        self.patch: int = config.vision_config.patch_size
        self._row_end, self._end = (tokenizer.convert_tokens_to_ids(name) for name in ("[IMG_BREAK]", "[IMG_END]"))
        if None in (self._row_end, self._end):
            raise self.unsupported("a tokenizer without [IMG_BREAK] and [IMG_END]")

    def _encoding(self, pictures: Sequence[Picture]) -> Pieces[list[EncodedImage]]:
        encoded = []
        for picture in pictures:
            seen = yield from in_pieces(self.processor, partial(self.resized, picture))
            encoded.append(self._encoded(picture, seen))
            yield
        return encoded

    def _encoded(self, picture: Picture, seen: np.ndarray) -> EncodedImage:
        features, query, key = self.tower(self._normalise(seen[None]).to(self.dtype))
        projected = self.network.model.multi_modal_projector(features[0], [seen.shape[1:]])
        shape = (seen.shape[1] // self.patch, seen.shape[2] // self.patch)
        embeddings = self._pack(projected, shape)
        return EncodedImage(
            digest=picture.digest,
            embeddings=embeddings,
            layout=self.layout(shape, picture.pixels.shape[:2]),
            query=query,
            key=key,
            scale=self.tower.scale,
            pixels=torch.from_numpy(np.ascontiguousarray(seen.transpose(1, 2, 0)))[None],
            patch=self.patch,
            arrange=partial(self._arrange, shape),
            merge=self.merge,
            detail=picture.detail,
        )

    @cached_property
    def _normalise(self) -> Normalisation:
        return Normalisation(self.processor, self.device)

    @property
    def encoder_layers(self) -> Sequence[nn.Module]:
        """See :attr:`MultimodalModel.encoder_layers`."""
        return self.tower.layers

    def resized(self, picture: Picture) -> np.ndarray:
        """The 8-bit picture that the tower sees: uint8 [3, height, width], whole squares of patches.

        Raises:
            PictureError: of a picture so narrow the processor leaves nothing.
        """
        side, processor = self.patch * self.merge, self.processor
        size = processor.size
        if picture.detail == "low":
            size = SizeDict(longest_edge=min(size.longest_edge, isqrt(LOW_DETAIL_TOKENS) * side))
        try:
            resized = processor.resize(
                picture.pixels.transpose(2, 0, 1),
                size=size,
                patch_size=SizeDict(height=side, width=side),
                resample=processor.resample,
            )
        except ValueError as error:
            raise self.too_narrow(picture) from error
        return np.asarray(resized)

    def layout(self, shape: tuple[int, int], size: Sequence[int]) -> TokenLayout:
        """Where the tokens of a picture come from.

        Args:
            shape: rows and columns of patches.
            size: height and width of the picture as it came, in pixels.
        """
        rows, columns = (side // self.merge for side in shape)
        place = torch.arange(rows * (columns + 1))
        row, column = place // (columns + 1), place % (columns + 1)
        structural = column == columns
        boxes = boxes_of(row, column, (size[0] / rows, size[1] / columns), (0.0, 0.0))
        return TokenLayout(
            grid=torch.zeros_like(place),
            row=row,
            column=column,
            structural=structural,
            boxes=boxes.masked_fill(structural[:, None], 0.0),
        )

    def _pack(self, projected: Tensor, shape: tuple[int, int]) -> Tensor:
        """A picture's tokens, row by row, with what ends each row: [N, hidden]."""
        rows, columns = (side // self.merge for side in shape)
        ends = torch.tensor([*[self._row_end] * (rows - 1), self._end], device=projected.device)
        ending = self.decoder.embed_tokens(ends)[:, None]
        return torch.cat((projected.view(rows, columns, -1), ending), dim=1).flatten(0, 1)

    def _arrange(self, shape: tuple[int, int], values: Tensor) -> Tensor:
        """Values per patch, [1, patches], averaged over the squares that become tokens, with the ends of rows: [N]."""
        return nn.functional.pad(nn.functional.avg_pool2d(values.view(1, *shape), self.merge), (0, 1)).flatten()
