"""What the Qwen-VL families share: pictures of any size as one grid of patches, merged two by two, on three axes.

A picture is resized to whole squares of patches, within a range of pixels that the image processor's configuration
gives; nothing is cut or padded. The tower reads the patches square by square; here they are put back into rows, so that
the importance map is a picture again. Tokens stand at (time, row, column), and text goes on behind the longer side
(M-RoPE); so a picture of N tokens takes far fewer than N positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from vflowopt.compression import EncodedImage
from vflowopt.layout import TokenLayout
from vflowopt.models.interface import LOW_DETAIL_TOKENS, MultimodalModel
from vflowopt.picture import Picture


class QwenVl(MultimodalModel):
    """A model of the Qwen-VL families.

    The configuration may name, under ``vflow_scoring_layer``, another layer to score tokens by than the last one whose
    patches see the whole picture.

    Args:
        network: the model; its decoder must have been built with this package's paged attention.
        tokenizer: its tokenizer.
        processor: its image processor, in the variant that needs no torchvision.

    Attributes:
        merge: side, in patches, of the square that becomes one token.
        patch: side of a patch in pixels.

    Raises:
        ModelError: the configuration uses something that is not supported, by name.
    """

    def __init__(self, network: Any, tokenizer: Any, processor: Any) -> None:
        super().__init__(network, tokenizer, processor)
        vision = network.config.vision_config
        self.merge: int = vision.spatial_merge_size
        self.patch: int = vision.patch_size
        if (processor.patch_size, processor.merge_size) != (self.patch, self.merge):
            raise self.unsupported(
                f"an image processor for patches of {processor.patch_size} pixels merged by {processor.merge_size} "
                f"before a tower for {self.patch} and {self.merge}"
            )
        # Only these see more of the picture than a window.
        whole = self._whole_layers()
        chosen = getattr(network.config, "vflow_scoring_layer", None)
        self.scoring_layer = whole[-1] if chosen is None else chosen % vision.depth
        if self.scoring_layer not in whole:
            raise self.unsupported(f"vflow_scoring_layer {chosen}, a layer whose patches see no more than a window,")

    def _whole_layers(self) -> Sequence[int]:
        """The layers of the tower whose patches attend to the whole picture, ascending."""
        return range(self.network.config.vision_config.depth)

    @property
    def _later(self) -> int:
        """Decoder layers behind which further features of a token enter (deepstack)."""
        return 0

    def _features(self, output: Any) -> Tensor:
        """What the decoder takes in of the tower's output: [tokens, hidden], or wider (deepstack)."""
        features: Tensor = output.pooler_output
        return features

    def _squares(self, grids: Tensor) -> Tensor:
        """Where the tower has each square of patches: int64 [tokens], in the order of its features."""
        return torch.arange(int(grids.prod(-1).sum()) // self.merge**2)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> list[EncodedImage]:
        """See :meth:`MultimodalModel.encode`."""
        begun = time.perf_counter()
        seen = [self.resized(picture) for picture in pictures]
        batch = self.processor(seen, do_resize=False, input_data_format=ChannelDimension.FIRST, return_tensors="pt")
        grids: Tensor = batch["image_grid_thw"]
        features, queries, keys = self._tower(batch["pixel_values"].to(self.device, self.dtype), grids)
        shapes = [(rows, columns) for _, rows, columns in grids.tolist()]
        counts = [rows * columns for rows, columns in shapes]
        embeddings = features.split([count // self.merge**2 for count in counts])
        milliseconds = self.milliseconds_since(begun) / len(pictures)
        return [
            EncodedImage(
                digest=picture.digest,
                embeddings=of_picture,
                layout=self.layout(shape, picture.pixels.shape[:2]),
                query=self._in_rows(query, shape),
                key=self._in_rows(key, shape),
                scale=self._attention.scaling,
                pixels=torch.from_numpy(np.ascontiguousarray(pixels.transpose(1, 2, 0)))[None],
                patch=self.patch,
                arrange=partial(self._arrange, shape),
                encode_ms=milliseconds,
                merge=self.merge,
                positions=self.positions(shape),
                later=self._later,
                detail=picture.detail,
            )
            for picture, pixels, shape, of_picture, query, key in zip(
                pictures, seen, shapes, embeddings, queries.split(counts), keys.split(counts), strict=True
            )
        ]

    def resized(self, picture: Picture) -> np.ndarray:
        """The 8-bit picture that the tower sees: uint8 [3, height, width], whole squares of patches.

        Raises:
            PictureError: the processor takes no picture of this shape.
        """
        side, size = self.patch * self.merge, self.processor.size
        pixels = picture.pixels.transpose(2, 0, 1)
        if picture.detail == "low":
            most = min(size.longest_edge, LOW_DETAIL_TOKENS * side**2)
            size = SizeDict(shortest_edge=min(size.shortest_edge, most), longest_edge=most)
        try:
            resized = self.processor.resize(pixels, size, self.processor.resample, factor=side)
        except ValueError as error:
            raise self.too_narrow(picture) from error
        return np.asarray(resized)

    def layout(self, shape: tuple[int, int], size: Sequence[int]) -> TokenLayout:
        """Where the tokens of a picture come from.

        Args:
            shape: rows and columns of patches.
            size: height and width of the picture as it came, in pixels.
        """
        row, column = self._cells(shape)
        rows, columns = (side // self.merge for side in shape)
        step = torch.tensor([size[1] / columns, size[0] / rows])
        corner = torch.stack((column, row), dim=-1) * step
        return TokenLayout(
            grid=torch.zeros_like(row),
            row=row,
            column=column,
            structural=torch.zeros_like(row, dtype=torch.bool),
            boxes=torch.cat((corner, corner + step), dim=-1).float(),
        )

    def positions(self, shape: tuple[int, int]) -> Tensor:
        """Time, row and column of each token of a picture of ``shape`` patches: int64 [3, N]."""
        row, column = self._cells(shape)
        return torch.stack((torch.zeros_like(row), row, column))

    def _cells(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        rows, columns = (side // self.merge for side in shape)
        place = torch.arange(rows * columns)
        return place // columns, place % columns

    @property
    def _attention(self) -> Any:
        """The attention of the scoring layer."""
        return self.network.model.visual.blocks[self.scoring_layer].attn

    def _tower(self, patches: Tensor, grids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [tokens, channels], and queries and keys [patches, heads, head_dim], square by square."""
        with _watched(self._attention) as seen:
            output = self.network.model.visual(patches, grid_thw=grids.to(self.device))
        projected = seen["projected"].view(len(patches), 3, self._attention.num_heads, -1)
        query, key = apply_rotary_pos_emb_vision(projected[:, 0], projected[:, 1], *seen["turns"])
        squares = self._squares(grids).to(self.device)
        query, key = (states.unflatten(0, (-1, self.merge**2))[squares].flatten(0, 1) for states in (query, key))
        return self._features(output), query, key

    def _in_rows(self, states: Tensor, shape: tuple[int, int]) -> Tensor:
        """States of a picture's patches, from square by square to row by row: [1, heads, patches, head_dim]."""
        rows, columns = (side // self.merge for side in shape)
        in_squares = states.view(rows, columns, self.merge, self.merge, *states.shape[1:])
        return in_squares.transpose(1, 2).flatten(0, 3).transpose(0, 1)[None]

    def _arrange(self, shape: tuple[int, int], values: Tensor) -> Tensor:
        """Values per patch, [1, patches], averaged over the squares that become tokens: [N]."""
        return nn.functional.avg_pool2d(values.view(1, *shape), self.merge).flatten()


@contextmanager
def _watched(attention: Any) -> Iterator[dict[str, Any]]:
    """Within, what an attention of the tower computes on its way: queries, keys and values, and how they are turned."""
    seen: dict[str, Any] = {}
    handles = (
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(turns=kwargs["position_embeddings"]), with_kwargs=True
        ),
        attention.qkv.register_forward_hook(lambda _, args, projected: seen.update(projected=projected)),
    )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
